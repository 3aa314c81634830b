"""OpenAI's answer forms: a request's choice deltas as stream chunks, or joined into one response."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from qwen3_dist.engine.outputs import TokenLogprob
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


class ChatAnswer(Answer):
    """`chat.completion` and its chunks."""

    prefix = "chatcmpl"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(self, model: str, tokenizer: Tokenizer | None, include_usage: bool) -> None:
        super().__init__(model, tokenizer, include_usage)
        self._begun: set[int] = set()

    def _choice(self, delta: ChoiceDelta) -> Json:
        return self._with(delta, {"message": {"role": "assistant", "content": delta.text}})

    def _choice_chunk(self, delta: ChoiceDelta) -> Json:
        role = {} if delta.index in self._begun else {"role": "assistant"}
        self._begun.add(delta.index)
        return self._with(delta, {"delta": {**role, "content": delta.text} if delta.text or role else {}})

    def _with(self, delta: ChoiceDelta, body: Json) -> Json:
        content = [
            {**self._token(p.token_id, p.logprob), "top_logprobs": self._top(p)} for p in delta.logprobs
        ]
        return {
            "index": delta.index,
            **body,
            "logprobs": {"content": content} if content else None,
            "finish_reason": delta.finish_reason,
        }

    def _top(self, logprob: TokenLogprob) -> list[Json]:
        return [self._token(*alternative) for alternative in logprob.top]

    def _token(self, token_id: int, logprob: float) -> Json:
        data = self._tokenizer and list(self._tokenizer.token_bytes(token_id))
        return {"token": self._token_text(token_id), "logprob": logprob, "bytes": data}


class CompletionAnswer(Answer):
    """`text_completion`. Where there is no tokenizer, the text is empty and `token_ids` are given."""

    prefix = "cmpl"
    object_name = chunk_name = "text_completion"

    def __init__(self, model: str, tokenizer: Tokenizer | None, include_usage: bool) -> None:
        super().__init__(model, tokenizer, include_usage)
        self._offsets: dict[int, int] = {}

    def _choice(self, delta: ChoiceDelta) -> Json:
        choice = {
            "index": delta.index,
            "text": delta.text,
            "logprobs": self._logprobs(delta) if delta.logprobs else None,
            "finish_reason": delta.finish_reason,
        }
        return choice if self._tokenizer else {**choice, "token_ids": list(delta.token_ids)}

    _choice_chunk = _choice

    def _logprobs(self, delta: ChoiceDelta) -> Json:
        """OpenAI's columns. Of several alternatives with one text (parts of a character) the likeliest stays."""
        return {
            "tokens": [self._token_text(p.token_id) for p in delta.logprobs],
            "token_logprobs": [p.logprob for p in delta.logprobs],
            "top_logprobs": [
                {self._token_text(i): value for i, value in reversed(p.top)} for p in delta.logprobs
            ],
            "text_offset": [self._offset(delta.index, p.token_id) for p in delta.logprobs],
        }

    def _offset(self, index: int, token_id: int) -> int:
        """Where the token's text begins in the choice's; moves past it. Special tokens have no text."""
        offset = self._offsets.get(index, 0)
        special = self._tokenizer is None or token_id in self._tokenizer.special_token_ids
        self._offsets[index] = offset + (0 if special else len(self._token_text(token_id)))
        return offset
