"""Incremental detokenization of one generated choice into whole characters, without parts of a stop string.

A byte-level token is a sequence of bytes, so an incremental UTF-8 decoder is all the state that detokenization needs,
and the cost of a token does not depend on the length of the text.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from qwen3_dist.text.partial_match import partial_match
from qwen3_dist.text.tokenizer import Tokenizer

# First two bytes of encoded surrogates, which are invalid UTF-8. Python's decoder would wait for a third byte.
_SURROGATES = frozenset(bytes((0xED, second)) for second in range(0xA0, 0xC0))


class TextStream:
    """Turns streamed token ids into text that is safe to send.

    The joined results of `push` and `finish` are `tokenizer.decode(all ids)`, cut before the stop string that is
    complete first (of two complete at once, the longer), or after it with `include_stop`. Stop strings complete within
    the first `min_tokens` ids are ignored. The result does not depend on how the ids were split into pushes.
    `stopped_by` is the stop string that matched, `num_tokens` the number of ids used, without those after it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        skip_special_tokens: bool = True,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self.stopped_by: str | None = None
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self.num_tokens = 0
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._has_part = False  # whether the decoder holds a part of a character
        self._held = ""  # the longest suffix of the text that may become a stop string
        self._shown: list[str] = []

    @property
    def stopped(self) -> bool:
        return self.stopped_by is not None

    @property
    def text(self) -> str:
        """The joined results so far."""
        return "".join(self._shown)

    def push(self, token_ids: Iterable[int]) -> str:
        """Adds the next tokens. Returns the text that is safe to send, "" once a stop string has matched."""
        shown = ""
        for token_id in token_ids:
            if self.stopped_by is not None:
                break
            self.num_tokens += 1
            if token_id not in self._skipped:
                shown += self._advance(self._tokenizer.token_bytes(token_id), final=False)
        return shown

    def finish(self) -> str:
        """Returns what was held back: the start of a stop string, an incomplete character as U+FFFD."""
        return self._advance(b"", final=True)

    def _advance(self, data: bytes, final: bool) -> str:
        if self.stopped:
            return ""
        if not (self._stop or self._has_part or final) and data.isascii():  # most tokens
            self._shown.append(text := data.decode("ascii"))
            return text
        text = self._held + self._utf8.decode(data, final)
        part = self._utf8.getstate()[0]
        if part[:2] in _SURROGATES:
            text += self._utf8.decode(b"", True)
            part = b""
        self._has_part = bool(part)
        matches = [
            (text.index(stop) + len(stop), text.index(stop), stop) for stop in self._stop if stop in text
        ]
        if matches and self.num_tokens > self._min_tokens:
            after, before, self.stopped_by = min(matches)
            end = after if self._include_stop else before
        else:
            end = len(text) if final else len(text) - partial_match(text, self._stop)
        self._held = "" if self.stopped else text[end:]
        if end:
            self._shown.append(text[:end])
        return text[:end]
