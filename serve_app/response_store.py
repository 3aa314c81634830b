"""Responses that clients may refer to later, in the memory of the ingress: what OpenAI's `store` is for.

The one ingress of a service sees every request, whichever replica answers it, so what it keeps is found by all that
follow. It is lost when the ingress restarts; a client is then told that the response is not found.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

import pydantic_core

from qwen3_dist.errors import RequestError
from serve_app.protocol.errors import to_json

Json = dict[str, Any]
_OVERHEAD = 1024  # bytes that an entry takes beside its JSON


@dataclass(frozen=True)
class _Entry:
    """A response with its output, and what it answered: input items after those of the response `previous`. All but
    that is JSON, which costs a garbage collection nothing. `used` is when it was last asked for, in seconds.
    """

    response: bytes
    output: bytes
    items: bytes
    previous: str | None
    used: float

    @property
    def num_bytes(self) -> int:
        return len(self.response) + len(self.output) + len(self.items) + _OVERHEAD


class ResponseStore:
    """At most `most_bytes` of responses, none of which was last used more than `most_s` seconds ago; those that were
    not used for longest go first. Methods may be called from any thread.
    """

    def __init__(self, most_bytes: int, most_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most_bytes = most_bytes
        self._most_s = most_s
        self._clock = clock
        self._num_bytes = 0
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # what was used last comes last
        self._lock = threading.Lock()

    @property
    def keeps(self) -> bool:
        """Whether anything is kept at all."""
        return self._most_bytes > 0

    def keep(self, response: bytes, items: list[Json], previous: str | None) -> None:
        """Keeps a response (JSON), which answers input `items` after those of the response `previous`."""
        whole = pydantic_core.from_json(response)
        entry = _Entry(response, to_json(whole["output"]), to_json(items), previous, self._clock())
        with self._lock:
            self._remove(whole["id"])
            self._entries[whole["id"]] = entry
            self._num_bytes += entry.num_bytes
            while self._num_bytes > self._most_bytes:
                self._remove(next(iter(self._entries)))

    def response(self, response_id: str) -> bytes:
        """The response as JSON. Raises RequestError (404)."""
        return self._entry(response_id, response_not_found(response_id)).response

    def delete(self, response_id: str) -> None:
        """Forgets a response. Raises RequestError (404)."""
        self.response(response_id)
        with self._lock:
            self._remove(response_id)

    def conversation(self, response_id: str | None) -> list[Json]:
        """The items of a response and of all that went before it, input and output. Raises RequestError (404)."""
        missing = _previous_not_found(response_id)
        turns: list[list[Json]] = []
        while response_id is not None:
            entry = self._entry(response_id, missing)
            turns.append([*pydantic_core.from_json(entry.items), *pydantic_core.from_json(entry.output)])
            response_id = entry.previous
        return [item for turn in reversed(turns) for item in turn]

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
            output = pydantic_core.from_json(self._entry(response_id, missing).output)
            outputs[response_id] = {item["id"]: item for item in output}
        item = outputs[response_id].get(item_id)
        if item is None:
            raise missing
        return item

    def _entry(self, response_id: str, missing: RequestError) -> _Entry:
        """An entry, which becomes the one used last. Raises `missing`."""
        with self._lock:
            now = self._clock()
            while self._entries and next(iter(self._entries.values())).used < now - self._most_s:
                self._remove(next(iter(self._entries)))
            if response_id not in self._entries:
                raise missing
            self._entries[response_id] = replace(self._entries[response_id], used=now)
            self._entries.move_to_end(response_id)
            return self._entries[response_id]

    def _remove(self, response_id: str) -> None:
        if entry := self._entries.pop(response_id, None):
            self._num_bytes -= entry.num_bytes


def response_not_found(response_id: str) -> RequestError:
    return RequestError(f"Response with id '{response_id}' not found.", status=HTTPStatus.NOT_FOUND)


def _previous_not_found(response_id: str | None) -> RequestError:
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
