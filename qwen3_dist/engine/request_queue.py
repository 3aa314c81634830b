"""The order in which sequences are admitted, and kept when blocks run out. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from qwen3_dist.engine.sequence import Sequence

MAX_PRIORITY_STEPS = 1024
_HALF_PRIORITY = 3  # the priority that counts as half of MAX_PRIORITY_STEPS


def priority_steps(priority: int) -> float:
    """How many steps later `priority` makes a sequence arrive: 256 for 1, 512 for 3, below MAX_PRIORITY_STEPS for any.

    Negative priorities count as earlier arrival.
    """
    return MAX_PRIORITY_STEPS * priority / (abs(priority) + _HALF_PRIORITY)


def scheduling_key(sequence: Sequence) -> tuple[float, int]:
    """Sort key of sequences, lowest first. Sequences that arrived together are ordered by id."""
    return sequence.arrival + priority_steps(sequence.priority), sequence.seq_id


def awaits_suspect(sequence: Sequence, running: Iterable[Sequence]) -> bool:
    """Whether `sequence` is a suspect, and one of another request runs that has no token yet (`RequestTerms`)."""
    return sequence.suspect and any(s.suspect and s.request_id != sequence.request_id for s in running)


def clear_suspect(sequence: Sequence, among: Iterable[Iterable[Sequence]]) -> None:
    """Has the request of `sequence`, which got a token, be a suspect no more, with its other choices."""
    if sequence.suspect:
        for each in chain(*among):
            each.suspect = each.suspect and each.request_id != sequence.request_id
