"""What the ingress sends to a replica: a request of some API, parsed."""

from serve_app.apis.shared.generation import GenerationRequest
from serve_app.apis.shared.pooling import PoolingRequest
from serve_app.apis.tokens import TextRequest

AnyRequest = GenerationRequest | PoolingRequest | TextRequest
