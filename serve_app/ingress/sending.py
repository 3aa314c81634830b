"""Backpressure: sends answers no faster than clients read them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import AbstractContextManager, aclosing, nullcontext
from http import HTTPStatus
from typing import Any

from fastapi import Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from cluster.ray_private import unsent_messages
from qwen3_dist.errors import QwenDistError, RequestError
from serve_app.apis.shared.errors import error_status
from serve_app.ingress.access_log import access_record
from serve_app.ingress.keep_alive import KeepAliveStream

MAX_UNSENT_BYTES = 2**16  # unsent bytes of a stream at which no more are taken from the replica
CHUNK_BYTES = 2**20  # of a large body, sent as one message; below gRPC's default limit of 4 MiB
_POLL_S = 0.02
_UNSENT = "qwen3_dist.unsent"


def track_unsent(scope: Scope, send: Send) -> None:
    """Stores in `scope` the messages that were given to `send` and that Serve has not passed on yet.

    Over gRPC, Serve's proxy takes messages as fast as the client reads them; otherwise it takes them at once.
    """
    unsent = unsent_messages(send)
    if unsent is not None:
        scope[_UNSENT] = unsent


def keeps_unsent(scope: Scope) -> bool:
    """Whether the request came through Serve's own proxy, whose unsent messages `track_unsent` found."""
    return _UNSENT in scope


async def _wait_for_client(scope: Scope, timeout_s: float) -> None:
    """Waits until at most MAX_UNSENT_BYTES are unsent. Raises RequestError (408) after `timeout_s` seconds; 0 means no
    timeout."""
    unsent: Collection[Any] = scope.get(_UNSENT, ())
    deadline = time.monotonic() + timeout_s
    while sum(len(message.get("body", b"")) for message in unsent) > MAX_UNSENT_BYTES:
        if timeout_s and time.monotonic() > deadline:
            raise RequestError(
                f"the answer was not read for {timeout_s:g} seconds; read it as it arrives",
                status=HTTPStatus.REQUEST_TIMEOUT,
            )
        await asyncio.sleep(_POLL_S)


# No proxy may hold parts back: nginx buffers answers unless it is told not to.
_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class EventStream(StreamingResponse):
    """Server-sent events: `first`, then `items`, which are closed when the stream ends or the client disconnects.

    A QwenDistError of `items` becomes the last event, in the error format of the API, and so does the timeout of a
    client that reads nothing for `timeout_s` seconds. The context `admitted` ends with the stream.
    """

    def __init__(
        self,
        first: bytes,
        items: AsyncGenerator[bytes, None] | KeepAliveStream,
        error_events: Callable[[Exception], bytes],
        timeout_s: float = 0.0,
        admitted: AbstractContextManager[Any] | None = None,
    ) -> None:
        self._first, self._items, self._error_events = first, items, error_events
        self._timeout_s = timeout_s
        self._admitted = admitted or nullcontext()
        self._scope: Scope = {}
        super().__init__((), media_type="text/event-stream", headers=_STREAM_HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        with self._admitted:
            async with aclosing(self._items):
                await super().__call__(scope, receive, send)

    async def stream_response(self, send: Send) -> None:
        async def send_part(part: bytes, more: bool = True) -> None:
            async with asyncio.timeout(
                self._timeout_s or None
            ):  # with HAProxy `send` itself waits for the client
                await send({"type": "http.response.body", "body": part, "more_body": more})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if self._first:
            await send_part(self._first)
        try:
            async for item in self._items:
                await send_part(item)
                await _wait_for_client(self._scope, self._timeout_s)
        except QwenDistError as error:
            access_record(self._scope).error_status = error_status(error)
            await send_part(self._error_events(error))
        await send_part(b"", more=False)


class LargeResponse(Response):
    """A body that is sent in chunks, each after the client has read most of the chunk before."""

    def __init__(self, body: bytes, status: int, timeout_s: float) -> None:
        super().__init__(body, status, media_type="application/json")
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        body = memoryview(self.body)
        for start in range(0, len(body), CHUNK_BYTES):
            chunk = bytes(body[start : start + CHUNK_BYTES])
            await send(
                {"type": "http.response.body", "body": chunk, "more_body": start + CHUNK_BYTES < len(body)}
            )
            try:
                await _wait_for_client(scope, self._timeout_s)
            except RequestError:
                return  # the client stopped reading, so the connection is closed
