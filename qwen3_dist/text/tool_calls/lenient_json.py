"""A parser of almost valid JSON, as models write it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from qwen3_dist.text.tool_calls.json_reader import KEYS, MAY_END, JsonReader, Next, in_string

_LITERALS = {"true": "true", "false": "false", "null": "null", "none": "null"}
# JSON has no such numbers. They become strings, as in the JSON mapping of protocol buffers.
_NOT_FINITE = re.compile(r"nan|[+-]?inf(inity)?", re.IGNORECASE)
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_ENDS_KEY = re.compile(r"\s*:")
# A quote with something else after it is an unescaped quote inside the string.
_ENDS_MEMBER = re.compile(r"\s*(?:\Z|[}\]]|,\s*(?:\Z|[\"'}\],]|[\w-]+\s*:)|[\"'][^\"'\n]*[\"']\s*:)")
_ENDS_ITEM = re.compile(r"\s*(?:\Z|[},\]])")
# In a list a comma between strings may be missing, unless the text around the quotes looks like code.
_BEFORE_STRING = re.compile(r"\s*[\"']")
_BEFORE_NEXT_ITEM = re.compile(
    r"(?<![\s(\[{=,:+])[\"']\s+(?P<quote>[\"'])[^\s\"'()\[\]{}=,:+][^\"'\n]*(?P=quote)(?:\s*(?:\Z|[},\]])|\s+[\"'])"
)


class LenientReader(JsonReader):
    """Parses a value as JsonReader does, and repairs errors that leave only one meaning.

    It accepts Python's literals and quotes, keys without quotes, missing and surplus commas, pairs of unescaped quotes
    inside strings, and missing, surplus or mismatched closing brackets. NaN and infinities become strings.
    `cut_string`: the text ended inside a string. `is_mixed`: a bracket also closed inner brackets of the other kind.
    Pass the whole text to one `read`, then call `finish`.
    """

    quotes = "\"'"

    def __init__(self, repairs_quotes: bool = True) -> None:
        super().__init__()
        self.cut_string = False
        self.is_mixed = False
        self._repairs_quotes = repairs_quotes
        self._num_inner = 0  # unescaped quotes inside the string under way

    def finish(self) -> str:
        """Closes what is open at the end of the text. Returns the output for that."""
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
        """Ends a string without a closing quote, if exactly the open brackets are closed after it."""
        tail = self._text[len(self._text.rstrip(MAY_END)) :]
        closes_all = "".join(tail.split()) == "".join(reversed(self._closers))
        # In `"C:\"}` the escaped quote may be the closing one.
        has_quote = self._text[: len(self._text) - len(tail)].endswith('\\"')
        self.failed = self._is_key or self._num_inner > 0 or bool(self._escape) or has_quote or not closes_all
        self._settle_escapes()
        if not self.failed:
            self.held = self.held[: len(self.held) - len("".join(map(in_string, tail)))] + '"'
            self._quote = ""
            self._end_value()

    def _read_unexpected(self, char: str) -> None:
        if char in "}]" and self._next not in (Next.VALUE, Next.COLON):
            self._read_closer(char)
        elif char == "," and self._next in (*KEYS, Next.ITEM, Next.ITEM_OR_END):
            pass  # drops a surplus comma
        elif self._next is Next.COMMA_OR_END and (char in self.quotes or char in "{["):
            self._next = Next.KEY if self._closers[-1] == "}" else Next.ITEM
            self.held += ","
            self._read_token(char)
        elif self._next in KEYS and _KEY.match(char):
            self._word = char
        else:
            self.failed = True

    def _read_closer(self, char: str) -> None:
        """Closes the innermost bracket that `char` matches, and those inside it. Ignores a surplus bracket."""
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
        # A quote before a colon looks like the end of a key, so the string before that key may lack its quote.
        self.failed = _ENDS_KEY.match(self._text, self._at + 1) is not None
        self._num_inner += 1
        return False


@dataclass(frozen=True)
class LenientJson:
    """A parsed value: the index after it, and its JSON, None if it cannot be repaired.

    `is_closed`: the text has the value's end. `is_cut`: the text ends inside a string. `is_mixed`: a bracket also
    closed inner brackets of the other kind.
    """

    end: int
    written: str | None
    is_closed: bool
    is_cut: bool
    is_mixed: bool


def lenient_json(text: str, start: int = 0, repairs_quotes: bool = True) -> LenientJson:
    """Parses the value at `start` of `text`. Without `repairs_quotes` any quote ends its string."""
    reader = LenientReader(repairs_quotes)
    end, shown = reader.read(text, start)
    is_closed = reader.done
    shown += reader.finish()
    written = None if reader.failed else shown + reader.held
    return LenientJson(end, written, is_closed, reader.cut_string, reader.is_mixed)
