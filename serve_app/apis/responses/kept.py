"""One request to /v1/responses whose answer may be kept: the ingress reads it and listens to its answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

import pydantic_core

from serve_app.apis.responses.request import ResponsesRead, ResponsesRequest, read_responses
from serve_app.apis.responses.store import ResponseStore
from serve_app.apis.shared.errors import to_json

_LAST_EVENTS = (b"event: response.completed\n", b"event: response.incomplete\n")


class KeptResponse:
    """Reads a body with what `store` has, and keeps the answer there unless the client says `store: false`."""

    def __init__(self, store: ResponseStore) -> None:
        self._store = store
        self._read: ResponsesRead | None = None

    def parse(self, body: bytes) -> ResponsesRequest:
        """Raises RequestError."""
        self._read = read_responses(body, self._store)
        return self._read.request

    async def heard(self, items: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
        """`items` of the answer as they come: a pair of HTTP status and bytes, then bytes. Keeps what they say."""
        read = self._read
        status: int | None = None
        async with aclosing(items):
            async for item in items:
                part = item
                if status is None:
                    status, part = item
                if read and read.kept and status == HTTPStatus.OK:
                    response = _last_response(part) if read.request.stream else part
                    if response is not None:
                        self._store.keep(response, read.items, read.previous, read.history)
                yield item


def _last_response(events: bytes) -> bytes | None:
    """The response that ends a stream, where `events` do."""
    for last in _LAST_EVENTS:
        _, found, rest = events.partition(last)
        if found:
            data = rest.removeprefix(b"data: ").partition(b"\n\n")[0]
            return to_json(pydantic_core.from_json(data)["response"])
    return None
