"""The parsed requests that the ingress sends to a replica."""

from serve_app.apis.shared.generation import GenerationRequest
from serve_app.apis.shared.pooling import PoolingRequest
from serve_app.apis.tokens import TextRequest

AnyRequest = GenerationRequest | PoolingRequest | TextRequest
