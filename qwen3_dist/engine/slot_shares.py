"""Shares the slots of running sequences between requests. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Items

from qwen3_dist.engine.sequence import Sequence


class SlotShares:
    """Slots that each request holds. No request has two while another waits with none, whatever its n."""

    def __init__(self) -> None:
        self._held: Counter[str] = Counter()
        self._several = 0  # requests that hold more than one

    def take(self, sequence: Sequence) -> None:
        """Counts a slot that `sequence` has got."""
        self._held[sequence.request_id] += 1
        self._several += self._held[sequence.request_id] == 2

    def give_back(self, sequence: Sequence) -> None:
        """Counts a slot that `sequence` had."""
        held = self._held[sequence.request_id] - 1
        self._several -= held == 1
        self._held[sequence.request_id] = held
        if not held:
            del self._held[sequence.request_id]

    def next(self, waiting: Items[Sequence]) -> int:
        """Whose turn it is, by place in the line `waiting`: the first of a request without a slot, else the first."""
        newcomers = (place for place, s in enumerate(waiting) if s.request_id not in self._held)
        return next(newcomers, 0)

    def owed(self, waiting: Items[Sequence], running: Items[Sequence]) -> Sequence | None:
        """The running sequence whose slot is owed to a request that waits with none; None if no request has several.

        It is the last in line of those.
        """
        if not self._several or waiting[self.next(waiting)].request_id in self._held:
            return None
        return next(s for s in reversed(running) if self._held[s.request_id] > 1)
