"""OpenAI's answer forms: a request's choice deltas as stream chunks, or joined into one response."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from qwen3_dist.text.tokenizer import Tokenizer
from serve_app.choices import ChoiceDelta

Json = dict[str, Any]


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class Answer(ABC):
    """The answer to one request. Chunks of one answer share its id and time."""

    prefix: str
    object_name: str
    chunk_name: str

    def __init__(self, model: str, tokenizer: Tokenizer | None, include_usage: bool) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._include_usage = include_usage
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def chunk(self, delta: ChoiceDelta) -> Json | None:
        """The stream chunk for `delta`; None where it shows nothing."""
        if not (delta.text or delta.logprobs or delta.finish_reason or self._tokenizer is None):
            return None
        return self._form(self.chunk_name, [self._choice_chunk(delta)], None if self._include_usage else ...)

    def usage_chunk(self, counts: Json) -> Json | None:
        """The last chunk of a stream whose client asked for usage."""
        return self._form(self.chunk_name, [], counts) if self._include_usage else None

    def response(self, choices: Iterable[Sequence[ChoiceDelta]], counts: Json) -> Json:
        """The whole answer: each choice's deltas joined."""
        joined = [
            ChoiceDelta(
                deltas[0].index,
                "".join(delta.text for delta in deltas),
                tuple(token_id for delta in deltas for token_id in delta.token_ids),
                tuple(logprob for delta in deltas for logprob in delta.logprobs),
                deltas[-1].finish_reason,
            )
            for deltas in choices
        ]
        return self._form(self.object_name, [self._choice(delta) for delta in joined], counts)

    def _form(self, name: str, choices: list[Json], counts: Any) -> Json:
        form = {
            "id": self._id,
            "object": name,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }
        return form if counts is ... else {**form, "usage": counts}

    @abstractmethod
    def _choice(self, delta: ChoiceDelta) -> Json: ...

    @abstractmethod
    def _choice_chunk(self, delta: ChoiceDelta) -> Json: ...

    def _token_text(self, token_id: int) -> str:
        if self._tokenizer is None:
            return f"token_id:{token_id}"
        return self._tokenizer.token_bytes(token_id).decode(errors="replace")
