"""Stores the answer of one request to /v1/responses as it passes through the ingress."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

import pydantic_core

from serve_app.apis.responses.request import ParsedResponsesRequest, ResponsesRequest, read_responses
from serve_app.apis.responses.store import ResponseStore
from serve_app.apis.shared.errors import to_json

_LAST_EVENTS = (b"event: response.completed\n", b"event: response.incomplete\n")


class ResponseRecorder:
    """Parses one request with `store`, and adds its answer there unless the client sets `store: false`.

    `on_added` is awaited with the response's id before the client gets the end of the answer.
    """

    def __init__(
        self, store: ResponseStore, on_added: Callable[[str], Awaitable[None]] | None = None
    ) -> None:
        self._store, self._on_added = store, on_added
        self._parsed: ParsedResponsesRequest | None = None

    def parse(self, body: bytes) -> ResponsesRequest:
        """Parses the body. Raises RequestError."""
        self._parsed = read_responses(body, self._store)
        return self._parsed.request

    async def record(self, items: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
        """Passes on the `items` of the answer (HTTP status and bytes, then bytes) and stores the response in them."""
        parsed = self._parsed
        status: int | None = None
        async with aclosing(items):
            async for item in items:
                part = item
                if status is None:
                    status, part = item
                if parsed and parsed.is_stored and status == HTTPStatus.OK:
                    response = _last_response(part) if parsed.request.stream else part
                    if response is not None:
                        added = self._store.add(response, parsed.items, parsed.previous, parsed.history)
                        if self._on_added:
                            await self._on_added(added)
                yield item


def _last_response(events: bytes) -> bytes | None:
    """Returns the response in the last event of a stream, if `events` contain it."""
    for last in _LAST_EVENTS:
        _, found, rest = events.partition(last)
        if found:
            data = rest.removeprefix(b"data: ").partition(b"\n\n")[0]
            return to_json(pydantic_core.from_json(data)["response"])
    return None
