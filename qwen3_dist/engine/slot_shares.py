"""Divides the slots of running sequences between requests. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Items

from qwen3_dist.engine.sequence import Sequence


class SlotShares:
    """Slots that each request and each client holds.

    No request keeps two while another waits with none, whatever its n. Among waiting sequences of equal priority the
    client with the fewest slots gets the next one, however many requests another has sent before.
    """

    def __init__(self) -> None:
        self.clients: set[str] = set()  # that ever sent something
        self._held: Counter[str] = Counter()
        self._of_client: Counter[str] = Counter()
        self._several = 0  # requests that hold more than one

    def add(self, sequence: Sequence) -> None:
        """Counts the slot that `sequence` was given."""
        self._held[sequence.request_id] += 1
        self._several += self._held[sequence.request_id] == 2
        self._of_client[sequence.client] += 1

    def remove(self, sequence: Sequence) -> None:
        """Counts the slot that `sequence` returned."""
        held = self._held[sequence.request_id] - 1
        self._several -= held == 1
        self._held[sequence.request_id] = held
        self._of_client[sequence.client] -= 1
        if not held:
            del self._held[sequence.request_id]

    def next(self, waiting: Items[Sequence]) -> int:
        """The index in `waiting` of the sequence to admit: the first of a request without a slot, else the first of
        all; of those with its priority, one of the client with the fewest slots."""
        newcomers = (place for place, s in enumerate(waiting) if s.request_id not in self._held)
        first = next(newcomers, None)
        if len(self.clients) < 2:
            return first or 0
        equals = range(len(waiting)) if first is None else [first, *newcomers]
        priority = waiting[equals[0]].priority
        return min(
            (place for place in equals if waiting[place].priority == priority),
            key=lambda place: self._of_client[waiting[place].client],
        )

    def owed(self, waiting: Items[Sequence], running: Items[Sequence]) -> Sequence | None:
        """The running sequence to preempt for a waiting request without a slot; None if no request has several slots.

        It is the lowest-priority sequence among those of requests with several slots.
        """
        if not self._several or waiting[self.next(waiting)].request_id in self._held:
            return None
        return next(s for s in reversed(running) if self._held[s.request_id] > 1)
