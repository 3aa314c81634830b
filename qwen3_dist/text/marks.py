"""Marks in text that comes piece by piece: tags and stop strings."""

from __future__ import annotations

from collections.abc import Sequence


def begun_mark(text: str, marks: Sequence[str]) -> int:
    """Length of the longest tail of `text` that is the beginning of one of `marks`, and not all of it."""
    longest = max((len(mark) - 1 for mark in marks), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        tail = text[-length:]
        if any(mark.startswith(tail) for mark in marks):
            return length
    return 0
