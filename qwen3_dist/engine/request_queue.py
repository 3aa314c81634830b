"""The order in which sequences are admitted, and kept when blocks run out. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
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


def without_suspects(waiting: Items[Sequence], running: Iterable[Sequence]) -> list[int]:
    """The indices in `waiting` of sequences that may run beside the suspects that do (`RequestTerms`)."""
    tried = {each.suspect for each in running if each.suspect}
    return [place for place, each in enumerate(waiting) if not each.suspect or tried <= {each.suspect}]


def clear_suspect(sequence: Sequence, among: Iterable[Iterable[Sequence]]) -> None:
    """Has the choices of the prompt of `sequence`, which got a token, be suspects no more; other prompts of
    the client's request still are."""
    if sequence.suspect:
        for each in chain(*among):
            if each.request_id == sequence.request_id:
                each.suspect = ""
