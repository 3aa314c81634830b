"""What embeddings, reranking and scoring share: prompts whose last hidden state is read, with no generation."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from array import array
from dataclasses import dataclass
from typing import Any, Self

from pydantic import model_validator

from qwen3_dist.errors import RequestError
from qwen3_dist.pooling_params import PoolingParams
from qwen3_dist.request_terms import RequestTerms
from serve_app.apis.shared.body import Json, ModelName, User
from serve_app.apis.shared.errors import error_object
from serve_app.apis.shared.prompts import Prompt, PromptRenderer
from serve_app.apis.shared.terms import TermsBody

MOST_INPUTS = 2048  # OpenAI's limit


class PoolingBody(TermsBody):
    """The fields that all bodies of pooling requests share."""

    model: ModelName = ""
    user: User = ""

    @model_validator(mode="after")
    def _check_truncation(self) -> Self:
        if "truncate_prompt_tokens" in self.undeclared:
            raise RequestError(
                "truncate_prompt_tokens is not supported; shorten the texts", param="truncate_prompt_tokens"
            )
        return self


@dataclass(frozen=True)
class PoolingResult:
    """The vector of each prompt, with the name of the model and the number of prompt tokens for the response."""

    model: str
    num_tokens: int
    vectors: list[array[float]]

    def response(self, prefix: str, **fields: Any) -> Json:
        """Returns the response body: an id that begins with `prefix`, `fields`, and the usage."""
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self.model,
            **fields,
            "usage": {"prompt_tokens": self.num_tokens, "total_tokens": self.num_tokens},
        }


@dataclass(frozen=True)
class PoolingRequest(ABC):
    """A parsed request for vectors: for each prompt, an embedding or logits of its last token's hidden state."""

    model: str
    terms: RequestTerms
    stream = False

    @property
    @abstractmethod
    def num_sequences(self) -> int:
        """The number of prompts."""

    @abstractmethod
    def pooling(self, renderer: PromptRenderer) -> PoolingParams:
        """Returns what to compute from each prompt. Raises RequestError if the checkpoint cannot do it."""

    @abstractmethod
    def prompts(self, renderer: PromptRenderer) -> list[Prompt]:
        """Returns the tokenized prompts. Raises RequestError without a tokenizer, or for a text that is too long."""

    @abstractmethod
    def input_path(self, index: int) -> str:
        """Returns the path in the body, such as `input[3]`, of the text of prompt `index`."""

    @abstractmethod
    def answer(self, result: PoolingResult) -> Json:
        """Returns the response body."""

    def with_error_path(self, error: RequestError, index: int) -> RequestError:
        """Returns `error`, raised for prompt `index`, with the prompt's path in the body as `param`."""
        if error.param != "prompt":
            return error
        path = self.input_path(index)
        return error.with_param(path, str(error).replace("the prompt", path))

    def error_body(self, error: Exception) -> dict[str, Any]:
        """Returns the JSON body for `error`."""
        return error_object(error)
