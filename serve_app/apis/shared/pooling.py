"""What embeddings, reranking and scoring share: prompts that are read to their end, with nothing to follow."""

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
from serve_app.apis.shared.body import Body, Json, ModelName, Priority, User
from serve_app.apis.shared.errors import error_object
from serve_app.apis.shared.prompts import Prompt, Texts

MOST_INPUTS = 2048  # OpenAI's


class PoolingBody(Body):
    """The fields that all of their bodies have."""

    model: ModelName = ""
    priority: Priority = 0
    user: User = ""

    @model_validator(mode="after")
    def _refuse_cuts(self) -> Self:
        if "truncate_prompt_tokens" in self.undeclared:
            raise RequestError(
                "truncate_prompt_tokens is not supported; shorten the texts", param="truncate_prompt_tokens"
            )
        return self


@dataclass(frozen=True)
class Pooled:
    """What came of a request: the name of what read it, the tokens of its prompts, and a vector for each."""

    model: str
    num_tokens: int
    vectors: list[array[float]]

    def form(self, prefix: str, **parts: Any) -> Json:
        """The answer with its own `parts`; an id begins with `prefix`."""
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self.model,
            **parts,
            "usage": {"prompt_tokens": self.num_tokens, "total_tokens": self.num_tokens},
        }


@dataclass(frozen=True)
class PoolingRequest(ABC):
    """A request for something that a model's state after each of some prompts says."""

    model: str
    priority: int
    stream = False

    @property
    @abstractmethod
    def num_sequences(self) -> int:
        """How many prompts there are."""

    @abstractmethod
    def pooling(self, texts: Texts) -> PoolingParams:
        """What to read of each prompt. Raises RequestError where the checkpoint lacks what that takes."""

    @abstractmethod
    def prompts(self, texts: Texts) -> list[Prompt]:
        """Each prompt. Raises RequestError where the checkpoint lacks what that takes, or for too long a text."""

    @abstractmethod
    def place(self, index: int) -> str:
        """The path of the field that prompt `index` came from."""

    @abstractmethod
    def answer(self, pooled: Pooled) -> Json:
        """The form in which this request is answered."""

    def blamed(self, error: RequestError, index: int) -> RequestError:
        """`error`, which prompt `index` met, in the client's words."""
        if error.param != "prompt":
            return error
        place = self.place(index)
        return error.blaming(place, str(error).replace("the prompt", place))

    def error_body(self, error: Exception) -> dict[str, Any]:
        """What says that this request failed."""
        return error_object(error)
