"""JSON as models write it when they do not quite write JSON."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from qwen3_dist.text.tool_calls.json_reader import KEYS, MAY_END, JsonReader, Next, in_string

_LITERALS = {"true": "true", "false": "false", "null": "null", "none": "null"}
# JSON has no such numbers. They become strings, as in the JSON form of protocol buffers.
_NOT_FINITE = re.compile(r"nan|[+-]?inf(inity)?", re.IGNORECASE)
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_ENDS_KEY = re.compile(r"\s*:")
# A quote that something else follows is part of the text, whose author forgot to escape it.
_ENDS_MEMBER = re.compile(r"\s*(?:\Z|[}\]]|,\s*(?:\Z|[\"'}\],]|[\w-]+\s*:)|[\"'][^\"'\n]*[\"']\s*:)")
_ENDS_ITEM = re.compile(r"\s*(?:\Z|[},\]])")
# In a list a comma may be missing between strings, unless they look like the code around and between quotes.
_BEFORE_STRING = re.compile(r"\s*[\"']")
_BEFORE_NEXT_ITEM = re.compile(
    r"(?<![\s(\[{=,:+])[\"']\s+(?P<quote>[\"'])[^\s\"'()\[\]{}=,:+][^\"'\n]*(?P=quote)(?:\s*(?:\Z|[},\]])|\s+[\"'])"
)


class LenientReader(JsonReader):
    """Reads a value as JsonReader does, and mends what can be meant in one way only.

    It takes Python's literals and quotes, keys without quotes, missing and needless commas, pairs of quotes inside of
    strings, and missing, needless or mixed up closing brackets. NaN and infinities become strings. `cut_string`
    says that the text ended inside a string, `is_mixed` that a bracket closed others than its own as well. Its text
    must be given whole, to one `read`, and ended by `finish`.
    """

    quotes = "\"'"

    def __init__(self, repairs_quotes: bool = True) -> None:
        super().__init__()
        self.cut_string = False
        self.is_mixed = False
        self._repairs_quotes = repairs_quotes
        self._num_inner = 0  # quotes that are text, in the string under way

    def finish(self) -> str:
        """Closes what is open once no more text comes. Returns what to show for that."""
        self._shown.clear()
        if self.done or self.failed:
            return ""
        if self._word:
            self._end_word()
        if self._quote:
            self.cut_string = True
            self._end_unquoted()
        if self._next in (Next.VALUE, Next.COLON):
            self.failed = True
        while self._closers and not self.failed:
            self._drop_comma()
            self._close()
        return "".join(self._shown)

    def _end_unquoted(self) -> None:
        """Ends a string without an end quote, if just the brackets that are open are closed after it."""
        tail = self._text[len(self._text.rstrip(MAY_END)) :]
        are_all = "".join(tail.split()) == "".join(reversed(self._closers))
        # In `"C:\"}` that quote may be the end.
        has_quote = self._text[: len(self._text) - len(tail)].endswith('\\"')
        self.failed = self._is_key or self._num_inner > 0 or bool(self._escape) or has_quote or not are_all
        self._settle_escapes()
        if not self.failed:
            self.held = self.held[: len(self.held) - len("".join(map(in_string, tail)))] + '"'
            self._quote = ""
            self._end_value()

    def _read_unexpected(self, char: str) -> None:
        if char in "}]" and self._next not in (Next.VALUE, Next.COLON):
            self._read_closer(char)
        elif char == "," and self._next in (*KEYS, Next.ITEM, Next.ITEM_OR_END):
            pass  # one comma is enough
        elif self._next is Next.COMMA_OR_END and (char in self.quotes or char in "{["):
            self._next = Next.KEY if self._closers[-1] == "}" else Next.ITEM
            self.held += ","
            self._read_token(char)
        elif self._next in KEYS and _KEY.match(char):
            self._word = char
        else:
            self.failed = True

    def _read_closer(self, char: str) -> None:
        """Closes what `char` may close, and all that is open inside; one that closes nothing is needless."""
        if char in self._closers:
            self._drop_comma()
            self.is_mixed = self.is_mixed or self._closers[-1] != char
            while self._closers[-1] != char:
                self._close()
            self._close()

    def _drop_comma(self) -> None:
        if self._next in (Next.KEY, Next.ITEM):
            before, _, after = self.held.rpartition(",")
            self.held = before + after

    def _end_word(self) -> None:
        if self._next not in KEYS:
            super()._end_word()
        elif _KEY.fullmatch(self._word):
            self.held += json.dumps(self._word)
            self._word, self._next = "", Next.COLON
        else:
            self.failed = True

    def _word_to_json(self, word: str) -> str | None:
        if _NOT_FINITE.fullmatch(word):
            return json.dumps(word)
        return _LITERALS.get(word.lower()) or super()._word_to_json(word)

    def _ends_string(self) -> bool:
        in_list = self._closers[-1:] == ["]"]
        end = _ENDS_ITEM if in_list else _ENDS_MEMBER
        if in_list and self._num_inner % 2 == 0 and _BEFORE_STRING.match(self._text, self._at + 1):
            self.failed = not _BEFORE_NEXT_ITEM.match(self._text, self._at)
            self._num_inner = 0
            return True
        if self._is_key or not self._repairs_quotes or end.match(self._text, self._at + 1):
            self.failed = self._num_inner % 2 == 1
            self._num_inner = 0
            return True
        # What seems to be a key may be one, so that an end quote is missing before it.
        self.failed = _ENDS_KEY.match(self._text, self._at + 1) is not None
        self._num_inner += 1
        return False


@dataclass(frozen=True)
class LenientJson:
    """A value in a text: where it ends, and its JSON, None if it has none.

    `is_closed` is false where the text ended before the value did, `is_cut` is true where it ended in a string,
    `is_mixed` where a bracket closed others than its own as well.
    """

    end: int
    written: str | None
    is_closed: bool
    is_cut: bool
    is_mixed: bool


def lenient_json(text: str, start: int = 0, repairs_quotes: bool = True) -> LenientJson:
    """The value that begins at `start` of `text`. Quotes inside of strings may be left as the ends that they seem."""
    reader = LenientReader(repairs_quotes)
    end, shown = reader.read(text, start)
    is_closed = reader.done
    shown += reader.finish()
    written = None if reader.failed else shown + reader.held
    return LenientJson(end, written, is_closed, reader.cut_string, reader.is_mixed)
