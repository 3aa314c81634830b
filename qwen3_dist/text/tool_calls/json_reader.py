"""An incremental parser of one JSON value, whose output can be sent before the value is complete."""

from __future__ import annotations

import re
from enum import Enum, auto

from qwen3_dist.text.tool_calls.json_escapes import Escapes

SPACE = " \t\n\r"
_WORD = frozenset("+-._0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_WORDS = re.compile(r"true|false|null|-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_PARTIAL_ESCAPE = re.compile(r'\\(["\\/bfnrt]|u[0-9a-fA-F]{0,4})')
_CLOSERS = {"{": "}", "[": "]"}
# At the end of a string without a closing quote these are not part of the string.
MAY_END = "}]" + SPACE


class Next(Enum):
    """What the grammar expects next, outside of strings and words."""

    VALUE = auto()
    ITEM = auto()
    ITEM_OR_END = auto()
    KEY_OR_END = auto()
    KEY = auto()
    COLON = auto()
    COMMA_OR_END = auto()


VALUES = (Next.VALUE, Next.ITEM, Next.ITEM_OR_END)
KEYS = (Next.KEY, Next.KEY_OR_END)
_ENDS = (Next.COMMA_OR_END, Next.KEY_OR_END, Next.ITEM_OR_END)


class JsonReader:
    """Parses one value. Its output, with `held` appended once the value is `done`, is valid JSON.

    The output is the input, except that control characters and stray backslashes in strings, which models write, are
    escaped. Quotes, brackets, keys and commas are held back until text of a string or a complete word follows, so
    that the output stays valid if the text turns out not to be JSON and a LenientReader parses it again. `failed`: the
    text is not JSON.
    """

    quotes = '"'

    def __init__(self) -> None:
        self.done = False
        self.failed = False
        self.held = ""
        self.shown_end = 0  # index in the last text passed to `read` up to which there was output
        self._text = ""  # the text passed to `read`, and the index in it
        self._at = 0
        self._next = Next.VALUE
        self._closers: list[str] = []
        self._word = ""
        self._quote = ""  # of the string under way
        self._is_key = False
        self._escape = ""
        self._escapes = Escapes()
        self._shown: list[str] = []

    def read(self, text: str, start: int) -> tuple[int, str]:
        """Parses `text` from `start`. Returns the index of the first character after the value, and the output."""
        self._shown.clear()
        self._text, self._at = text, start
        while self._at < len(text) and not (self.done or self.failed):
            self._at += self._consume(text[self._at])
        return self._at, "".join(self._shown)

    def _consume(self, char: str) -> bool:
        """Reads `char` and returns True, if it belongs to the value."""
        if self._quote:
            self._read_in_string(char)
        elif self._word and char not in _WORD:
            self._end_word()
            return False
        elif self._word:
            self._word += char
        elif char in SPACE:
            self.held += char
        else:
            self._read_token(char)
        return not self.failed

    def _read_token(self, char: str) -> None:
        begins_value = self._next in VALUES
        if char in self.quotes and (begins_value or self._next in KEYS):
            self._quote, self._is_key, self._escapes = char, not begins_value, Escapes()
            self.held += '"'
        elif begins_value and char in _CLOSERS:
            self._closers.append(_CLOSERS[char])
            self._next = Next.KEY_OR_END if char == "{" else Next.ITEM_OR_END
            self.held += char
        elif begins_value and char in _WORD:
            self._word = char
        elif self._closers and char == self._closers[-1] and self._next in _ENDS:
            self._close()
        elif char == "," and self._next is Next.COMMA_OR_END:
            self._next = Next.KEY if self._closers[-1] == "}" else Next.ITEM
            self.held += char
        elif char == ":" and self._next is Next.COLON:
            self._next = Next.VALUE
            self.held += char
        else:
            self._read_unexpected(char)

    def _read_unexpected(self, char: str) -> None:
        """Reads a character that JSON does not allow there."""
        self.failed = True

    def _close(self) -> None:
        self.held += self._closers.pop()
        self._end_value()

    def _read_in_string(self, char: str) -> None:
        if self._escape:
            self._read_in_escape(char)
            return
        self._escapes.see(char)
        if char == "\\":
            self._escape = char
        elif char == self._quote and self._ends_string():
            self._quote = ""
            self._settle_escapes()
            self.held += '"'
            if self._is_key:
                self._next = Next.COLON
            else:
                self._end_value()
        elif char == '"':
            self._append_text('\\"')
        elif char in MAY_END:
            self.held += in_string(char)
        else:
            self._append_text(in_string(char))

    def _ends_string(self) -> bool:
        """Whether the quote at `_at` ends its string."""
        return True

    def _read_in_escape(self, char: str) -> None:
        begun = self._escape + char
        if self._quote == char == "'":
            self._escape = ""
            self._append_text(char)
        elif not _PARTIAL_ESCAPE.fullmatch(begun):
            self._escape = ""
            self._escapes.add_stray()
            self.held = self._escapes.release() + self.held
            self._append_text("\\\\")
            for plain in begun[1:]:
                self._read_in_string(plain)
        elif begun[1] != "u" or len(begun) == len("\\u0000"):
            self._escape = ""
            self._append_escape(begun)
        else:
            self._escape = begun

    def _append_escape(self, escape: str) -> None:
        if self._escapes.add(escape[1]):
            self._escapes.hold(self.held, escape)
            self.held = ""
        else:
            self._append_text(escape)

    def _settle_escapes(self) -> None:
        """Settles the meaning of the escapes in the string that ends here."""
        self.held = self._escapes.release() + self.held
        self.failed = self.failed or self._escapes.is_unclear

    def _end_word(self) -> None:
        written = self._word_to_json(self._word)
        self._word = ""
        if written is None:
            self.failed = True
            return
        self._show(written)
        self._end_value()

    def _word_to_json(self, word: str) -> str | None:
        """Returns the JSON of a word outside of strings, None if it is not a literal or a number."""
        return word if _WORDS.fullmatch(word) else None

    def _end_value(self) -> None:
        self._next = Next.COMMA_OR_END
        self.done = not self._closers

    def _append_text(self, text: str) -> None:
        """Appends text to the string under way. A key is held back until its value."""
        if self._escapes.is_holding:
            self._escapes.hold_text(self.held + text)
            self.held = ""
        elif self._is_key:
            self.held += text
        else:
            self._show(text)

    def _show(self, text: str) -> None:
        self._shown.append(self.held + text)
        self.held = ""
        self.shown_end = self._at + bool(self._quote)


def in_string(char: str) -> str:
    """Escapes `char` for a JSON string if it is a control character."""
    return char if char >= " " else f"\\u{ord(char):04x}"
