"""One JSON value read character by character, so that what was read of it can be shown before its end."""

from __future__ import annotations

import re
from enum import Enum, auto

from qwen3_dist.text.tool_calls.json_escapes import Escapes

SPACE = " \t\n\r"
_WORD = frozenset("+-._0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_WORDS = re.compile(r"true|false|null|-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_BEGUN_ESCAPE = re.compile(r'\\(["\\/bfnrt]|u[0-9a-fA-F]{0,4})')
_CLOSERS = {"{": "}", "[": "]"}
MAY_END = "}]" + SPACE  # at the end of a string: if its quote is missing they are not part of it


class Next(Enum):
    """What may come next outside of strings and words."""

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
    """Reads one value. What it showed, with `held` appended once the value is `done`, is valid JSON.

    It shows the characters that it read, except that strings may hold control characters and backslashes that
    begin no escape: models write both, and they are shown as the escapes that they should have been. Quotes,
    brackets, keys and commas are held until more of a string's text or a whole word follows them, so what was
    shown stays true where JSON ends and a LenientReader reads the text again. `failed` once it cannot be JSON.
    """

    quotes = '"'

    def __init__(self) -> None:
        self.done = False
        self.failed = False
        self.held = ""
        self.shown_end = 0  # where, in the text that was read last, that which was shown last ends
        self._text = ""  # as `read` has it, and where it stands
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
        """Reads from `start` on. Returns where the first character lies that is not the value's, and what to show."""
        self._shown.clear()
        self._text, self._at = text, start
        while self._at < len(text) and not (self.done or self.failed):
            self._at += self._consume(text[self._at])
        return self._at, "".join(self._shown)

    def _consume(self, char: str) -> bool:
        """Reads `char`, if it is the value's."""
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
        """Reads what JSON does not have there."""
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
        """Whether the quote at hand ends its string."""
        return True

    def _read_in_escape(self, char: str) -> None:
        begun = self._escape + char
        if self._quote == char == "'":
            self._escape = ""
            self._append_text(char)
        elif not _BEGUN_ESCAPE.fullmatch(begun):
            self._escape = ""
            self._escapes.add_stray()
            self.held = self._escapes.release() + self.held
            self._append_text("\\\\")
            for plain in begun[1:]:
                self._read_in_string(plain)
        elif begun[1] != "u" or len(begun) == len("\\u0000"):
            self._escape = ""
            self._take_escape(begun)
        else:
            self._escape = begun

    def _take_escape(self, escape: str) -> None:
        if self._escapes.add(escape[1]):
            self._escapes.hold(self.held, escape)
            self.held = ""
        else:
            self._append_text(escape)

    def _settle_escapes(self) -> None:
        """Decides what the escapes of the string under way mean, which ends here."""
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
        """JSON of a word outside of strings; None if it means nothing."""
        return word if _WORDS.fullmatch(word) else None

    def _end_value(self) -> None:
        self._next = Next.COMMA_OR_END
        self.done = not self._closers

    def _append_text(self, text: str) -> None:
        """Takes a piece of a string; a key waits for its value."""
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
    """`char` as JSON's strings have it, if it is no quote."""
    return char if char >= " " else f"\\u{ord(char):04x}"
