"""Log-probabilities of the tokens of an answer's text, told from those of thoughts, calls and marks between them."""

from __future__ import annotations

from collections import deque

from qwen3_dist.protocol.outputs import TokenLogprob
from qwen3_dist.text.choice import ChoiceDelta
from qwen3_dist.text.tokenizer import Tokenizer
from serve_app.apis.shared.answer import Json
from serve_app.apis.shared.openai import logprob


class TextLogprobs:
    """Takes the deltas of one choice; has for each what OpenAI gives beside its text.

    Tokens whose text is held back for a while are given with the next text that is shown.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._held: list[TokenLogprob] = []
        self._in_text = False
        self._ready: deque[list[Json]] = deque()

    def push(self, delta: ChoiceDelta) -> None:
        self._held += delta.logprobs[delta.num_reasoning_tokens :]
        if delta.text:
            shown = delta.text.encode()
            if not self._in_text:
                self._drop_marks(shown)
            if (
                delta.finish_reason
                and self._held
                and not shown.endswith(self._bytes(self._held[-1].token_id))
            ):
                self._held.pop()  # the token that ended the answer
            self._in_text = True
            self._ready.append([self._form(token) for token in self._held])
            self._held = []
            return
        if delta.reasoning or delta.tool_calls:
            self._held, self._in_text = [], False
        self._ready.append([])

    def take(self) -> list[Json]:
        """Those of the oldest delta that was not taken."""
        return self._ready.popleft()

    def take_all(self) -> list[Json]:
        """Those of all deltas that were not taken."""
        taken = [token for tokens in self._ready for token in tokens]
        self._ready.clear()
        return taken

    def _drop_marks(self, shown: bytes) -> None:
        """Drops what came ahead of the text: </think>, breaks, ends of calls."""
        first = next(
            (i for i, token in enumerate(self._held) if shown.startswith(self._bytes(token.token_id))), 0
        )
        del self._held[:first]

    def _bytes(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)

    def _form(self, token: TokenLogprob) -> Json:
        return {
            **self._token(token.token_id, token.logprob),
            "top_logprobs": [self._token(*other) for other in token.top],
        }

    def _token(self, token_id: int, value: float) -> Json:
        data = self._bytes(token_id)
        return {"token": data.decode(errors="replace"), "logprob": logprob(value), "bytes": list(data)}
