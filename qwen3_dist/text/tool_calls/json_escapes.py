"""What the backslashes of a JSON string mean, where models forget to double them."""

from __future__ import annotations

import re

_DRIVE = re.compile(r"[A-Za-z]:")
_BREAKS = "nrt"


class Escapes:
    r"""The escapes of one string, as they come.

    A backslash that begins no escape is text. In a string that has one, `\b` and `\f` are text as well, and so are
    `\n`, `\r` and `\t` if the string begins with a Windows drive (`C:\new\Users`). Elsewhere these three remain white
    space if one of them stands before anything but a letter, as in code of several lines; if none does,
    the string `is_unclear`. Text after an escape that may turn out to be text is held until that is known.
    """

    def __init__(self) -> None:
        self._has_stray = False
        self._head = ""  # the begin of the string
        self._has_drive = False
        self._is_after_break = False
        self._num_breaks = 0
        self._has_sure_break = False
        self._held: list[
            tuple[str, str]
        ] = []  # text as it is if there is a stray backslash, and if there is none

    @property
    def is_holding(self) -> bool:
        return bool(self._held)

    @property
    def is_unclear(self) -> bool:
        """Whether the string, which ends here, may mean two things."""
        is_sure = self._has_sure_break or self._is_after_break
        return self._has_stray and self._num_breaks > 0 and not is_sure

    def see(self, char: str) -> None:
        """Looks at the next character of the string, its end included."""
        if self._is_after_break:
            self._is_after_break = False
            self._has_sure_break = self._has_sure_break or not char.isalpha()
        if len(self._head) < len("C:\\x"):
            self._head += char

    def add_stray(self) -> None:
        """Takes a backslash that begins no escape."""
        self._has_stray = True
        self._see_drive()

    def add(self, letter: str) -> bool:
        """Takes the escape that `letter` names. Returns whether it is to be held."""
        if letter not in "\\u":
            self._see_drive()
        if letter in "bf" or (letter in _BREAKS and self._has_drive):
            return True
        if letter in _BREAKS:
            self._num_breaks += 1
            self._is_after_break = True
        return False

    def hold(self, before: str, escape: str) -> None:
        """Holds `escape`, and `before` ahead of it."""
        self._held.append((f"{before}\\{escape}", before + escape))

    def hold_text(self, text: str) -> None:
        self._held.append((text, text))

    def release(self) -> str:
        """What was held, once it is known what it means."""
        held = "".join(stray if self._has_stray else plain for stray, plain in self._held)
        self._held = []
        return held

    def _see_drive(self) -> None:
        self._has_drive = self._has_drive or _DRIVE.fullmatch(self._head[:-1]) is not None
