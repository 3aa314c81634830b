"""Interprets backslashes in JSON strings of models that forget to double them."""

from __future__ import annotations

import re

_DRIVE = re.compile(r"[A-Za-z]:")
_BREAKS = "nrt"


class Escapes:
    r"""Interprets the escapes of one streamed string.

    A stray backslash, which begins no valid escape, is text. In a string that has one, `\b` and `\f` are text too, and
    so are `\n`, `\r` and `\t` if the string begins with a Windows drive (`C:\new\Users`). Without a drive these three
    are white space if any of them precedes a non-letter, as in code of several lines; otherwise the string
    `is_unclear`. An escape that may turn out to be text is held back, with the text after it, until that is known.
    """

    def __init__(self) -> None:
        self._has_stray = False
        self._head = ""  # the first characters of the string
        self._has_drive = False
        self._is_after_break = False
        self._num_breaks = 0
        self._has_sure_break = False
        self._held: list[tuple[str, str]] = []  # readings with and without a stray backslash

    @property
    def is_holding(self) -> bool:
        return bool(self._held)

    @property
    def is_unclear(self) -> bool:
        """Whether the string, which ends here, is ambiguous."""
        is_sure = self._has_sure_break or self._is_after_break
        return self._has_stray and self._num_breaks > 0 and not is_sure

    def see(self, char: str) -> None:
        """Observes the next character of the string, including its closing quote."""
        if self._is_after_break:
            self._is_after_break = False
            self._has_sure_break = self._has_sure_break or not char.isalpha()
        if len(self._head) < len("C:\\x"):
            self._head += char

    def add_stray(self) -> None:
        """Adds a backslash that begins no valid escape."""
        self._has_stray = True
        self._see_drive()

    def add(self, letter: str) -> bool:
        """Adds the escape `\\letter`. Returns whether the caller must hold it back."""
        if letter not in "\\u":
            self._see_drive()
        if letter in "bf" or (letter in _BREAKS and self._has_drive):
            return True
        if letter in _BREAKS:
            self._num_breaks += 1
            self._is_after_break = True
        return False

    def hold(self, before: str, escape: str) -> None:
        """Holds back `escape`, after the text `before`."""
        self._held.append((f"{before}\\{escape}", before + escape))

    def hold_text(self, text: str) -> None:
        self._held.append((text, text))

    def release(self) -> str:
        """Returns what was held back, once its meaning is known."""
        held = "".join(stray if self._has_stray else plain for stray, plain in self._held)
        self._held = []
        return held

    def _see_drive(self) -> None:
        self._has_drive = self._has_drive or _DRIVE.fullmatch(self._head[:-1]) is not None
