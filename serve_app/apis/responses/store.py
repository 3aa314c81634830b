"""Responses that clients may refer to later, in the memory of the ingress: what OpenAI's `store` is for.

The one ingress of a service sees every request, whichever replica answers it, so what it keeps is found by all that
follow. It is lost when the ingress restarts; a client is then told that the response is not found.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import pydantic_core

from qwen3_dist.errors import RequestError
from serve_app.apis.shared.errors import to_json

Json = dict[str, Any]
_OVERHEAD = 1024  # bytes that an entry takes beside its JSON


@dataclass
class _Entry:
    """A response with its output, and what it answered: input items after those of the response `previous`. All but
    that is JSON, which costs a garbage collection nothing.

    `used` is when it was last asked for, in seconds, and `num_followers` how many entries have it as `previous`. A
    response that was deleted is None: its entry is kept for the followers alone.
    """

    response: bytes | None
    output: bytes
    items: bytes
    previous: str | None
    used: float
    num_followers: int = 0

    @property
    def num_bytes(self) -> int:
        return len(self.response or b"") + len(self.output) + len(self.items) + _OVERHEAD


class ResponseStore:
    """At most `most_bytes` of responses, none of which was last used more than `most_s` seconds ago; those that were
    not used for longest go first. Use of a response is use of all that it follows, so that none goes before its
    followers. Methods may be called from any thread.
    """

    def __init__(self, most_bytes: int, most_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most_bytes = most_bytes
        self._most_s = most_s
        self._clock = clock
        self.num_bytes = 0  # that its entries take
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # what was used last comes last
        self._lock = threading.Lock()

    @property
    def keeps(self) -> bool:
        """Whether anything is kept at all."""
        return self._most_bytes > 0

    def keep(self, response: bytes, items: list[Json], previous: str | None, history: list[Json]) -> None:
        """Keeps a response (JSON), which answers input `items` after the response `previous`, whose conversation is
        `history`: `previous` may be gone by now."""
        whole = pydantic_core.from_json(response)
        output = to_json(whole["output"])
        with self._lock:
            if previous not in self._entries:
                previous, items = None, [*history, *items]
            self._remove(whole["id"])
            entry = _Entry(response, output, to_json(items), previous, self._clock())
            self._entries[whole["id"]] = entry
            self.num_bytes += entry.num_bytes
            if previous is not None:
                self._entries[previous].num_followers += 1
            self._use(whole["id"])
            while self.num_bytes > self._most_bytes:
                self._remove(next(iter(self._entries)))

    def response(self, response_id: str) -> bytes:
        """The response as JSON. Raises RequestError (404)."""
        with self._lock:
            response = self._found(response_id, response_not_found(response_id)).response
        assert response is not None
        return response

    def delete(self, response_id: str) -> None:
        """Forgets a response, but for what its followers need of it. Raises RequestError (404)."""
        with self._lock:
            entry = self._found(response_id, response_not_found(response_id))
            self.num_bytes -= entry.num_bytes
            entry.response = None
            self.num_bytes += entry.num_bytes
            if not entry.num_followers:
                self._remove(response_id)

    def conversation(self, response_id: str | None) -> list[Json]:
        """The items of a response and of all that went before it, input and output. Raises RequestError (404)."""
        if response_id is None:
            return []
        with self._lock:
            self._found(response_id, _previous_not_found(response_id))
            turns = [(entry.items, entry.output) for _, entry in self._chain(response_id)]
        parts = [part for turn in reversed(turns) for part in turn]
        return [item for part in parts for item in pydantic_core.from_json(part)]

    def resolved(self, items: list[Json]) -> list[Json]:
        """`items` with those that they refer to in their places. Raises RequestError (404)."""
        outputs: dict[str, dict[str, Json]] = {}
        return [
            self._referred(item["id"], outputs) if item.get("type") == "item_reference" else item
            for item in items
        ]

    def _referred(self, item_id: str, outputs: dict[str, dict[str, Json]]) -> Json:
        """An output item; `outputs` are those of the responses that were looked at already, by their ids."""
        missing = _item_not_found(item_id)
        _, _, rest = item_id.partition("_")
        response_id = f"resp_{rest.partition('_')[0]}"  # an item's id contains that of its response
        if response_id not in outputs:
            with self._lock:
                output = self._found(response_id, missing).output
            outputs[response_id] = {item["id"]: item for item in pydantic_core.from_json(output)}
        item = outputs[response_id].get(item_id)
        if item is None:
            raise missing
        return item

    def _found(self, response_id: str, missing: RequestError) -> _Entry:
        """The entry of a response that was not deleted, which is used by this. Raises `missing`."""
        now = self._clock()
        while self._entries and next(iter(self._entries.values())).used < now - self._most_s:
            self._remove(next(iter(self._entries)))
        entry = self._entries.get(response_id)
        if entry is None or entry.response is None:
            raise missing
        self._use(response_id)
        return entry

    def _use(self, response_id: str) -> None:
        """Puts an entry last, and behind it those that it follows."""
        now = self._clock()
        for name, entry in self._chain(response_id):
            entry.used = now
            self._entries.move_to_end(name)

    def _chain(self, response_id: str) -> Iterator[tuple[str, _Entry]]:
        """An entry, the one that it follows, and so on."""
        name: str | None = response_id
        while name is not None:
            entry = self._entries[name]
            yield name, entry
            name = entry.previous

    def _remove(self, response_id: str | None) -> None:
        """Removes an entry, and those that were kept for it alone."""
        while response_id is not None and (entry := self._entries.pop(response_id, None)):
            self.num_bytes -= entry.num_bytes
            response_id = None
            if entry.previous is not None:
                previous = self._entries[entry.previous]
                previous.num_followers -= 1
                if previous.response is None and not previous.num_followers:
                    response_id = entry.previous


def response_not_found(response_id: str) -> RequestError:
    return RequestError(f"Response with id '{response_id}' not found.", status=HTTPStatus.NOT_FOUND)


def _previous_not_found(response_id: str) -> RequestError:
    return RequestError(
        f"Previous response with id '{response_id}' not found.",
        "previous_response_id",
        HTTPStatus.NOT_FOUND,
        "previous_response_not_found",
    )


def _item_not_found(item_id: str) -> RequestError:
    return RequestError(
        f"Item with id '{item_id}' not found. Items are not persisted when `store` is set to false. Try again with "
        "`store` set to true, or remove this item from your input.",
        "input",
        HTTPStatus.NOT_FOUND,
    )


NOTHING_KEPT = ResponseStore(0, 0)
