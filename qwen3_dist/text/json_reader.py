"""One JSON value read character by character, so that what was read of it can be shown before its end."""

from __future__ import annotations

import re
from enum import Enum, auto

SPACE = " \t\n\r"
_WORD = frozenset("+-.0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_WORDS = re.compile(r"true|false|null|-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_BEGUN_ESCAPE = re.compile(r'\\(["\\/bfnrt]|u[0-9a-fA-F]{0,4})')
_CLOSERS = {"{": "}", "[": "]"}


class _Next(Enum):
    """What may come next outside of strings and words."""

    VALUE = auto()
    ITEM_OR_END = auto()
    KEY_OR_END = auto()
    KEY = auto()
    COLON = auto()
    COMMA_OR_END = auto()


class JsonReader:
    """Reads one value. Whatever was shown of it becomes valid JSON with `closing` appended.

    What it shows are the characters it read, except that strings may hold control characters and backslashes
    that begin no escape: models write both, and they are shown as the escapes that they should have been.
    `done` once the value is complete, `failed` once it cannot be JSON.
    """

    def __init__(self) -> None:
        self.done = False
        self.failed = False
        self._next = _Next.VALUE
        self._closers: list[str] = []
        self._word = ""
        self._in_string = False
        self._is_key = False
        self._escape = ""
        self._held = ""  # read, but a key or a comma that needs a value after it
        self._shown: list[str] = []

    def read(self, text: str, start: int) -> tuple[int, str]:
        """Reads from `start` on. Returns where the first character lies that is not the value's, and what to show."""
        self._shown.clear()
        at = start
        while at < len(text) and not (self.done or self.failed):
            at += self._takes(text[at])
        return at, "".join(self._shown)

    def closing(self) -> str:
        """What completes that which was shown of a list or an object."""
        quote = '"' if self._in_string and not self._is_key else ""
        return quote + "".join(reversed(self._closers))

    def _takes(self, char: str) -> bool:
        """Reads `char`, if it is the value's."""
        if self._in_string:
            self._read_in_string(char)
        elif self._word and char not in _WORD:
            self._end_word()
            return False
        elif self._word:
            self._word += char
        elif char in SPACE:
            self._held += char
        else:
            self._read_token(char)
        return not self.failed

    def _read_token(self, char: str) -> None:
        begins_value = self._next in (_Next.VALUE, _Next.ITEM_OR_END)
        if char == '"' and (begins_value or self._next in (_Next.KEY, _Next.KEY_OR_END)):
            self._in_string, self._is_key = True, not begins_value
            self._show_unless_key(char)
        elif begins_value and char in _CLOSERS:
            self._closers.append(_CLOSERS[char])
            self._next = _Next.KEY_OR_END if char == "{" else _Next.ITEM_OR_END
            self._show(char)
        elif begins_value and char in _WORD:
            self._word = char
        elif self._may_close(char):
            self._closers.pop()
            self._show(char)
            self._end_value()
        elif char == "," and self._next is _Next.COMMA_OR_END:
            self._next = _Next.KEY if self._closers[-1] == "}" else _Next.VALUE
            self._held += char
        elif char == ":" and self._next is _Next.COLON:
            self._next = _Next.VALUE
            self._held += char
        else:
            self.failed = True

    def _may_close(self, char: str) -> bool:
        ends = (_Next.COMMA_OR_END, _Next.KEY_OR_END, _Next.ITEM_OR_END)
        return bool(self._closers) and char == self._closers[-1] and self._next in ends

    def _read_in_string(self, char: str) -> None:
        if self._escape:
            self._read_in_escape(char)
        elif char == "\\":
            self._escape = char
        elif char == '"':
            self._in_string = False
            self._show_unless_key(char)
            if self._is_key:
                self._next = _Next.COLON
            else:
                self._end_value()
        else:
            self._show_unless_key(char if char >= " " else f"\\u{ord(char):04x}")

    def _read_in_escape(self, char: str) -> None:
        begun = self._escape + char
        if not _BEGUN_ESCAPE.fullmatch(begun):
            self._escape = ""
            self._show_unless_key("\\\\")
            for plain in begun[1:]:
                self._read_in_string(plain)
        elif begun[1] != "u" or len(begun) == len("\\u0000"):
            self._escape = ""
            self._show_unless_key(begun)
        else:
            self._escape = begun

    def _end_word(self) -> None:
        if not _WORDS.fullmatch(self._word):
            self.failed = True
            return
        self._show(self._word)
        self._word = ""
        self._end_value()

    def _end_value(self) -> None:
        self._next = _Next.COMMA_OR_END
        self.done = not self._closers

    def _show_unless_key(self, text: str) -> None:
        if self._is_key:
            self._held += text
        else:
            self._show(text)

    def _show(self, text: str) -> None:
        self._shown.append(self._held + text)
        self._held = ""
