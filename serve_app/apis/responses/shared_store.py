"""A store of responses that hands copies to other stores and takes theirs, for services with several ingresses."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import pydantic_core

from serve_app.apis.responses.store import ENTRY_OVERHEAD, Entry, ResponseStore
from serve_app.apis.shared.errors import to_json

_MAX_DELETED = 10_000  # ids of deleted responses that are remembered, against late copies of them


class Turn(NamedTuple):
    """A stored response as one store hands it to another; the fields are those of an entry.

    `response` is None if it was deleted and only its followers need it. `idle_s` is the time since it was last used.
    """

    response_id: str
    response: bytes | None
    output: bytes
    items: bytes
    previous: str | None
    idle_s: float

    @property
    def num_bytes(self) -> int:
        """Memory that the turn takes in a store."""
        return len(self.response or b"") + len(self.output) + len(self.items) + ENTRY_OVERHEAD


class SharedStore(ResponseStore):
    """A ResponseStore whose responses can be handed to others, as `Turn`s. Thread-safe."""

    def __init__(
        self, max_bytes: int, max_idle_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(max_bytes, max_idle_s, clock)
        self._deleted: OrderedDict[str, None] = OrderedDict()  # ids, the latest last

    def delete(self, response_id: str) -> None:
        """As ResponseStore.delete; a copy of the response that another store hands over later is not kept."""
        with self._lock:
            self._deleted[response_id] = None
            if len(self._deleted) > _MAX_DELETED:
                self._deleted.popitem(last=False)
        super().delete(response_id)

    def has(self, response_id: str) -> bool:
        """Whether requests may refer to a response."""
        with self._lock:
            entry = self._entries.get(response_id)
            return entry is not None and entry.response is not None

    def ids(self) -> list[str]:
        """The ids of all entries, the most recently used first, so that each comes after what it follows."""
        with self._lock:
            self._expire()
            return list(reversed(self._entries))

    def turns(self, response_ids: Iterable[str], max_bytes: int) -> list[Turn | None]:
        """The first of the entries called `response_ids`, at least one of them and at most `max_bytes` together.

        None stands for one that is not here any more.
        """
        found: list[Turn | None] = []
        with self._lock:
            for response_id in response_ids:
                turn = self._turn(response_id)
                max_bytes -= turn.num_bytes if turn else 0
                if found and max_bytes < 0:
                    break
                found.append(turn)
        return found

    def chain(self, response_id: str) -> list[Turn]:
        """A response after all that it follows, the earliest first; nothing if requests may not refer to it."""
        with self._lock:
            self._expire()
            entry = self._entries.get(response_id)
            if entry is None or entry.response is None:
                return []
            turns = [self._turn(name) for name, _ in self._chain(response_id)]
        return [turn for turn in reversed(turns) if turn]

    def whole(self, response_id: str) -> Turn | None:
        """A response as one that follows none: with the conversation before it among its items. None if it is gone."""
        turns = self.chain(response_id)
        if not turns:
            return None
        parts = [part for turn in turns[:-1] for part in (turn.items, turn.output)]
        items = [item for part in (*parts, turns[-1].items) for item in pydantic_core.from_json(part)]
        return turns[-1]._replace(items=to_json(items), previous=None)

    def keep(self, turn: Turn) -> bool:
        """Adds a response that another store handed over, unless it is here or was deleted.

        Returns False, and adds nothing, if the response that it follows is not here.
        """
        with self._lock:
            if turn.response_id in self._entries or turn.response_id in self._deleted:
                return True
            if not self._can_follow(turn):
                return False
            self._insert_turn(turn)
            self._touch(turn.response_id)
            self._shrink()
        return True

    def keep_chain(self, turns: list[Turn]) -> bool:
        """Adds what `chain` of another store gave. Returns whether requests may refer to the last of them now."""
        with self._lock:
            if not turns or turns[-1].response_id in self._deleted:
                return False
            for turn in turns:
                if turn.response_id not in self._entries and self._can_follow(turn):
                    self._insert_turn(turn)
            last = turns[-1].response_id
            if last in self._entries:
                self._touch(last)
            self._shrink()
        return self.has(last)

    def keep_older(self, turns: Iterable[Turn]) -> bool:
        """Adds turns as less recently used than all that is here, in the order of `ids`.

        Leaves out those that are here or were deleted, and those whose predecessor is not here. Returns False once the
        store is full.
        """
        with self._lock:
            for turn in turns:
                if self.num_bytes + turn.num_bytes > self._max_bytes:
                    return False
                known = turn.response_id in self._entries or turn.response_id in self._deleted
                if not known and self._can_follow(turn):
                    self._insert_turn(turn)
                    self._entries.move_to_end(turn.response_id, last=False)
        return True

    def _can_follow(self, turn: Turn) -> bool:
        return turn.previous is None or turn.previous in self._entries

    def _turn(self, response_id: str) -> Turn | None:
        entry = self._entries.get(response_id)
        if entry is None:
            return None
        idle_s = self._clock() - entry.last_used
        return Turn(response_id, entry.response, entry.output, entry.items, entry.previous, idle_s)

    def _insert_turn(self, turn: Turn) -> None:
        response = None if turn.response_id in self._deleted else turn.response
        last_used = self._clock() - turn.idle_s
        self._insert(turn.response_id, Entry(response, turn.output, turn.items, turn.previous, last_used))
