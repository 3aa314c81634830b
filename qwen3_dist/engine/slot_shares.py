"""Divides the slots of running sequences between requests. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Items

from qwen3_dist.engine.sequence import Sequence


class SlotShares:
    """Slots that each request holds. No request keeps two while another waits with none, whatever its n."""

    def __init__(self) -> None:
        self._held: Counter[str] = Counter()
        self._several = 0  # requests that hold more than one

    def add(self, sequence: Sequence) -> None:
        """Counts the slot that `sequence` was given."""
        self._held[sequence.request_id] += 1
        self._several += self._held[sequence.request_id] == 2

    def remove(self, sequence: Sequence) -> None:
        """Counts the slot that `sequence` returned."""
        held = self._held[sequence.request_id] - 1
        self._several -= held == 1
        self._held[sequence.request_id] = held
        if not held:
            del self._held[sequence.request_id]

    def next(self, waiting: Items[Sequence]) -> int:
        """The index in `waiting` of the sequence to admit: the first of a request without a slot, else 0."""
        newcomers = (place for place, s in enumerate(waiting) if s.request_id not in self._held)
        return next(newcomers, 0)

    def owed(self, waiting: Items[Sequence], running: Items[Sequence]) -> Sequence | None:
        """The running sequence to preempt for a waiting request without a slot; None if no request has several slots.

        It is the lowest-priority sequence among those of requests with several slots.
        """
        if not self._several or waiting[self.next(waiting)].request_id in self._held:
            return None
        return next(s for s in reversed(running) if self._held[s.request_id] > 1)
