"""Tags and stop strings in text that comes piece by piece."""

from __future__ import annotations

from collections.abc import Sequence


def partial_match(text: str, strings: Sequence[str]) -> int:
    """Length of the longest end of `text` that one of `strings` starts with, leaving out whole strings.

    That much of the text must be held back until it is known what follows.
    """
    longest = max((len(string) - 1 for string in strings), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        tail = text[-length:]
        if any(string.startswith(tail) for string in strings):
            return length
    return 0
