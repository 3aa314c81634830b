"""The line in which sequences wait, and in which they keep their blocks: by priority and arrival. Imports no torch."""

from __future__ import annotations

from qwen3_dist.engine.sequence import Sequence

MOST_PLACES = 1024
_HALF_PRIORITY = 3  # moves a sequence by half of MOST_PLACES


def places(priority: int) -> float:
    """Steps of later arrival that `priority` counts as: 256 for 1, 512 for 3, fewer than MOST_PLACES for any."""
    return MOST_PLACES * priority / (abs(priority) + _HALF_PRIORITY)


def place_in_line(sequence: Sequence) -> tuple[float, int]:
    """Sorts sequences; those that came together by their ids."""
    return sequence.arrival + places(sequence.priority), sequence.seq_id
