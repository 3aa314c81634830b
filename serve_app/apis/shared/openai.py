"""What OpenAI's chat and text completions share: the form around choices, and usage in streams."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qwen3_dist.protocol.outputs import TokenLogprob
from qwen3_dist.text.choice import ChoiceDelta
from serve_app.apis.shared.answer import DONE, Answer, Json, Served, event


def logprob(value: float) -> float:
    """As JSON has it, which knows no infinity; OpenAI's least is this."""
    return max(value, -9999.0)


@dataclass(frozen=True)
class Shown:
    """What an answer shows beside its text: token counts at a stream's end or in every chunk, token ids, ids as
    the names of tokens, log-probabilities of the answer's and of the prompt's tokens, the prompt ahead of the
    answer; and whether it shows reasoning.
    """

    usage: bool = False
    usage_so_far: bool = False
    token_ids: bool = False
    tokens_as_ids: bool = False
    logprobs: bool = False
    prompt_logprobs: bool = False
    echo: bool = False
    reasoning: bool = True


class OpenAIAnswer(Answer):
    """Chunks of one answer share its id and time."""

    prefix: str
    object_name: str
    chunk_name: str

    def __init__(self, served: Served, shown: Shown) -> None:
        super().__init__(served)
        # Without a tokenizer ids are all there is.
        self.shown = shown if served.tokenizer else replace(shown, token_ids=True)
        self._id = f"{self.prefix}-{self.unique}"
        self._created = int(time.time())

    def delta(self, delta: ChoiceDelta) -> bytes:
        counts = self.usage.to_json() if self.shown.usage_so_far else None if self.shown.usage else ...
        return b"".join(
            event(self._form(self.chunk_name, [choice], counts)) for choice in self.chunk_choices(delta)
        )

    def end(self) -> bytes:
        if not self.shown.usage:
            return DONE
        return event(self._form(self.chunk_name, [], self.usage.to_json())) + DONE

    def whole(self, choices: Sequence[ChoiceDelta]) -> Json:
        return self._form(self.object_name, [self.choice(c) for c in choices], self.usage.to_json())

    def token_text(self, token_id: int) -> str:
        tokenizer = self.served.tokenizer
        return tokenizer.token_bytes(token_id).decode(errors="replace") if tokenizer else ""

    def token_name(self, token_id: int) -> str:
        """What log-probabilities call a token: its text, or its id where there is no text or ids are asked for."""
        as_id = self.shown.tokens_as_ids or self.served.tokenizer is None
        return f"token_id:{token_id}" if as_id else self.token_text(token_id)

    def beside(self, delta: ChoiceDelta) -> Json:
        """What vLLM adds to a choice: what ended it, and token ids where they are asked for."""
        ids = {"token_ids": list(delta.token_ids)} if self.shown.token_ids else {}
        return {"stop_reason": delta.stop_reason, **ids} if delta.finish_reason else ids

    def prompt_logprobs(self, delta: ChoiceDelta) -> list[Json | None] | None:
        """vLLM's form: by token id, of each token of the prompt and of the likeliest in its place."""
        if delta.prompt_logprobs is None or not self.shown.prompt_logprobs:
            return None
        return [self._by_token_id(p) if p else None for p in delta.prompt_logprobs]

    def _by_token_id(self, scored: TokenLogprob) -> Json:
        likeliest = ((token_id, value, rank) for rank, (token_id, value) in enumerate(scored.top, start=1))
        return {
            str(token_id): {
                "logprob": logprob(value),
                "rank": rank,
                "decoded_token": self.token_text(token_id),
            }
            for token_id, value, rank in ((scored.token_id, scored.logprob, scored.rank), *likeliest)
        }

    @abstractmethod
    def choice(self, delta: ChoiceDelta) -> Json:
        """A finished choice."""

    @abstractmethod
    def chunk_choices(self, delta: ChoiceDelta) -> list[Json]:
        """The choice of each chunk that shows `delta`."""

    def _form(self, name: str, choices: list[Json], counts: Any) -> Json:
        form = {
            "id": self._id,
            "object": name,
            "created": self._created,
            "model": self.served.model,
            "choices": choices,
        }
        return form if counts is ... else {**form, "usage": counts}
