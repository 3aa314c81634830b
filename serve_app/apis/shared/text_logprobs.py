"""Selects the log-probabilities of an answer's text from those of reasoning, tool calls and tags."""

from __future__ import annotations

from collections import deque

from qwen3_dist.protocol.outputs import TokenLogprob
from qwen3_dist.text.choice import ChoiceDelta
from qwen3_dist.text.tokenizer import Tokenizer
from serve_app.apis.shared.answer import Json
from serve_app.apis.shared.openai import logprob


class TextLogprobs:
    """A queue with an item per delta of one choice: OpenAI's log-probabilities of the text tokens in it.

    Tokens whose text is held back belong to the next delta that has text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._held: list[TokenLogprob] = []
        self._in_text = False
        self._ready: deque[list[Json]] = deque()

    def push(self, delta: ChoiceDelta) -> None:
        """Adds the item of `delta`."""
        self._held += delta.logprobs[delta.num_reasoning_tokens :]
        if delta.text:
            shown = delta.text.encode()
            if not self._in_text:
                self._drop_before_text(shown)
            if (
                delta.finish_reason
                and self._held
                and not shown.endswith(self._bytes(self._held[-1].token_id))
            ):
                self._held.pop()  # the token that ended the answer
            self._in_text = True
            self._ready.append([self._token_logprobs(token) for token in self._held])
            self._held = []
            return
        if delta.reasoning or delta.tool_calls:
            self._held, self._in_text = [], False
        self._ready.append([])

    def pop(self) -> list[Json]:
        """Removes and returns the oldest item."""
        return self._ready.popleft()

    def pop_all(self) -> list[Json]:
        """Removes and returns all items, joined."""
        tokens = [token for item in self._ready for token in item]
        self._ready.clear()
        return tokens

    def _drop_before_text(self, shown: bytes) -> None:
        """Drops held tokens that precede the text: `</think>`, line breaks, closing tags of tool calls."""
        first = next(
            (i for i, token in enumerate(self._held) if shown.startswith(self._bytes(token.token_id))), 0
        )
        del self._held[:first]

    def _bytes(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)

    def _token_logprobs(self, token: TokenLogprob) -> Json:
        return {
            **self._logprob(token.token_id, token.logprob),
            "top_logprobs": [self._logprob(*other) for other in token.top],
        }

    def _logprob(self, token_id: int, value: float) -> Json:
        data = self._bytes(token_id)
        return {"token": data.decode(errors="replace"), "logprob": logprob(value), "bytes": list(data)}
