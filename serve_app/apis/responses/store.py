"""Stores responses in the ingress's memory, for OpenAI's `store` and `previous_response_id`.

The ingress sees all requests, so any later request finds a stored response, whichever replica answers it. Several
ingresses hand each other copies (`shared_store`). A response is lost when all ingresses are; requests for it are then
answered 404.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pydantic_core

from qwen3_dist.errors import RequestError
from serve_app.apis.responses.not_stored import item_not_found, previous_not_found, response_not_found
from serve_app.apis.shared.errors import to_json

Json = dict[str, Any]
ENTRY_OVERHEAD = 1024  # bytes of an entry beside its JSON


@dataclass
class Entry:
    """A stored response, its output items, and the input `items` it answered, which follow the response `previous`.

    They are JSON bytes, which garbage collection does not traverse. `last_used` is in seconds of the store's clock.
    `num_followers` counts the entries whose `previous` is this one. `response` is None once deleted; the entry then
    stays for its followers.
    """

    response: bytes | None
    output: bytes
    items: bytes
    previous: str | None
    last_used: float
    num_followers: int = 0

    @property
    def num_bytes(self) -> int:
        return len(self.response or b"") + len(self.output) + len(self.items) + ENTRY_OVERHEAD


class ResponseStore:
    """An LRU store of at most `max_bytes`, from which responses expire `max_idle_s` seconds after their last use.

    Using a response also uses all that it follows, so that none is evicted before its followers. Thread-safe.
    """

    def __init__(
        self, max_bytes: int, max_idle_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_bytes = max_bytes
        self._max_idle_s = max_idle_s
        self._clock = clock
        self.num_bytes = 0
        self._entries: OrderedDict[str, Entry] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()

    def limit(self, max_bytes: int, max_idle_s: float) -> None:
        """Changes how much is kept, and for how long."""
        with self._lock:
            self._max_bytes, self._max_idle_s = max_bytes, max_idle_s
            self._shrink()

    @property
    def is_enabled(self) -> bool:
        """Whether the store may keep anything."""
        return self._max_bytes > 0

    def add(self, response: bytes, items: list[Json], previous: str | None, history: list[Json]) -> str:
        """Adds a `response` in JSON, which answers the input `items` after the response `previous`. Returns its id.

        `history` is the conversation of `previous`, which may have been evicted meanwhile.
        """
        whole = pydantic_core.from_json(response)
        response_id: str = whole["id"]
        output = to_json(whole["output"])
        with self._lock:
            if previous not in self._entries:
                previous, items = None, [*history, *items]
            self._remove(response_id)
            self._insert(response_id, Entry(response, output, to_json(items), previous, self._clock()))
            self._touch(response_id)
            self._shrink()
        return response_id

    def response(self, response_id: str) -> bytes:
        """Returns a response as JSON. Raises RequestError (404)."""
        with self._lock:
            response = self._lookup(response_id, response_not_found(response_id)).response
        assert response is not None
        return response

    def delete(self, response_id: str) -> None:
        """Deletes a response, except the items that its followers need. Raises RequestError (404)."""
        with self._lock:
            entry = self._lookup(response_id, response_not_found(response_id))
            self.num_bytes -= entry.num_bytes
            entry.response = None
            self.num_bytes += entry.num_bytes
            if not entry.num_followers:
                self._remove(response_id)

    def conversation(self, response_id: str | None) -> list[Json]:
        """Returns the input and output items up to and including a response. Raises RequestError (404)."""
        if response_id is None:
            return []
        with self._lock:
            self._lookup(response_id, previous_not_found(response_id))
            turns = [(entry.items, entry.output) for _, entry in self._chain(response_id)]
        parts = [part for turn in reversed(turns) for part in turn]
        return [item for part in parts for item in pydantic_core.from_json(part)]

    def resolve_references(self, items: list[Json]) -> list[Json]:
        """Returns `items` with each item reference replaced by the stored item. Raises RequestError (404)."""
        outputs: dict[str, dict[str, Json]] = {}
        return [
            self._referenced_item(item["id"], outputs) if item.get("type") == "item_reference" else item
            for item in items
        ]

    def _referenced_item(self, item_id: str, outputs: dict[str, dict[str, Json]]) -> Json:
        """Returns an output item. `outputs` caches output items by response id and item id."""
        _, _, rest = item_id.partition("_")
        response_id = f"resp_{rest.partition('_')[0]}"  # an item's id contains its response's id
        missing = item_not_found(response_id, item_id)
        if response_id not in outputs:
            with self._lock:
                output = self._lookup(response_id, missing).output
            outputs[response_id] = {item["id"]: item for item in pydantic_core.from_json(output)}
        item = outputs[response_id].get(item_id)
        if item is None:
            raise missing
        return item

    def _lookup(self, response_id: str, missing: RequestError) -> Entry:
        """Evicts expired entries, then returns an entry as the last used. Raises `missing` if absent or deleted."""
        self._expire()
        entry = self._entries.get(response_id)
        if entry is None or entry.response is None:
            raise missing
        self._touch(response_id)
        return entry

    def _insert(self, response_id: str, entry: Entry) -> None:
        self._entries[response_id] = entry
        self.num_bytes += entry.num_bytes
        if entry.previous is not None:
            self._entries[entry.previous].num_followers += 1

    def _expire(self) -> None:
        now = self._clock()
        while self._entries and next(iter(self._entries.values())).last_used < now - self._max_idle_s:
            self._remove(next(iter(self._entries)))

    def _shrink(self) -> None:
        while self.num_bytes > self._max_bytes:
            self._remove(next(iter(self._entries)))

    def _touch(self, response_id: str) -> None:
        """Marks an entry, and then those that it follows, as most recently used."""
        now = self._clock()
        for name, entry in self._chain(response_id):
            entry.last_used = now
            self._entries.move_to_end(name)

    def _chain(self, response_id: str) -> Iterator[tuple[str, Entry]]:
        """Yields an entry, then the one that it follows, and so on."""
        name: str | None = response_id
        while name is not None:
            entry = self._entries[name]
            yield name, entry
            name = entry.previous

    def _remove(self, response_id: str | None) -> None:
        """Removes an entry, and the deleted entries that it alone follows."""
        while response_id is not None and (entry := self._entries.pop(response_id, None)):
            self.num_bytes -= entry.num_bytes
            response_id = None
            if entry.previous is not None:
                previous = self._entries[entry.previous]
                previous.num_followers -= 1
                if previous.response is None and not previous.num_followers:
                    response_id = entry.previous


DISABLED_STORE = ResponseStore(0, 0)
