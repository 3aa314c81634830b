"""Partial matches of tags and stop strings at the end of streamed text."""

from __future__ import annotations

from collections.abc import Sequence


def partial_match(text: str, strings: Sequence[str]) -> int:
    """Returns the length of the longest suffix of `text` that is a proper prefix of one of `strings`.

    A streaming parser holds back that suffix until more text follows.
    """
    longest = max((len(string) - 1 for string in strings), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        tail = text[-length:]
        if any(string.startswith(tail) for string in strings):
            return length
    return 0
