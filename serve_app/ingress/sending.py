"""Answers on their way to clients, no faster than clients read them."""

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
from serve_app.ingress.late_stream import LateStream

MOST_UNSENT = 2**16  # bytes that wait for a client to read before more are asked of a replica
PIECE = 2**20  # bytes of a body that are sent at once, less than gRPC takes by default
_POLL_S = 0.02
_UNSENT = "qwen3_dist.unsent"


def watch_sending(scope: Scope, send: Send) -> None:
    """Lets responses to `scope` see which of the messages given to `send` Serve has not passed on yet.

    Serve's proxy takes them as fast as the client reads if it talks to deployments by gRPC, otherwise at once.
    """
    unsent = unsent_messages(send)
    if unsent is not None:
        scope[_UNSENT] = unsent


async def _await_reader(scope: Scope, timeout_s: float) -> None:
    """Waits until little is unsent. Raises RequestError (408) if the client reads nothing for `timeout_s` seconds; 0:
    it may take as long as it likes."""
    unsent: Collection[Any] = scope.get(_UNSENT, ())
    give_up = time.monotonic() + timeout_s
    while sum(len(message.get("body", b"")) for message in unsent) > MOST_UNSENT:
        if timeout_s and time.monotonic() > give_up:
            raise RequestError(
                f"the answer was not read for {timeout_s:g} seconds; read it as it comes",
                status=HTTPStatus.REQUEST_TIMEOUT,
            )
        await asyncio.sleep(_POLL_S)


class EventStream(StreamingResponse):
    """Server-sent events: `first`, then `items`, which are closed also when the client leaves.

    An error of ours out of `items` becomes the last events, in the API's form; so does a client that reads nothing
    for `timeout_s` seconds. The stream ends the context `admitted`.
    """

    def __init__(
        self,
        first: bytes,
        items: AsyncGenerator[bytes, None] | LateStream,
        error_events: Callable[[Exception], bytes],
        timeout_s: float = 0.0,
        admitted: AbstractContextManager[Any] | None = None,
    ) -> None:
        self._first, self._items, self._error_events = first, items, error_events
        self._timeout_s = timeout_s
        self._admitted = admitted or nullcontext()
        self._scope: Scope = {}
        super().__init__((), media_type="text/event-stream", headers={"cache-control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        with self._admitted:
            async with aclosing(self._items):
                await super().__call__(scope, receive, send)

    async def stream_response(self, send: Send) -> None:
        async def send_part(part: bytes, more: bool = True) -> None:
            async with asyncio.timeout(self._timeout_s or None):  # Serve's HAProxy mode makes `send` wait
                await send({"type": "http.response.body", "body": part, "more_body": more})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send_part(self._first)
        try:
            async for item in self._items:
                await send_part(item)
                await _await_reader(self._scope, self._timeout_s)
        except QwenDistError as error:
            await send_part(self._error_events(error))
        await send_part(b"", more=False)


class LargeResponse(Response):
    """A body that goes out in pieces, each once the one before is on its way."""

    def __init__(self, body: bytes, status: int, timeout_s: float) -> None:
        super().__init__(body, status, media_type="application/json")
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        body = memoryview(self.body)
        for start in range(0, len(body), PIECE):
            piece = bytes(body[start : start + PIECE])
            await send({"type": "http.response.body", "body": piece, "more_body": start + PIECE < len(body)})
            try:
                await _await_reader(scope, self._timeout_s)
            except RequestError:
                return  # the connection ends where the client stopped to read
