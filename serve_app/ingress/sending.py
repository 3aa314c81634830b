"""Backpressure: sends answers no faster than clients read them."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterator
from contextlib import AbstractContextManager, aclosing, contextmanager, nullcontext
from http import HTTPStatus
from typing import Any

from fastapi import Response
from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from cluster.ray_private import unsent_messages
from qwen3_dist.errors import QwenDistError, RequestError
from serve_app.apis.shared.answer import last_events
from serve_app.apis.shared.errors import error_status
from serve_app.ingress.access_log import access_record
from serve_app.ingress.interrupt import Interrupt, InterruptedWaitError
from serve_app.ingress.keep_alive import KeepAliveStream

MAX_UNSENT_BYTES = 2**16  # unsent bytes of a stream at which no more are taken from the replica
CHUNK_BYTES = 2**20  # of a large body, sent as one message; below gRPC's default limit of 4 MiB
_POLL_S = 0.02
_UNSENT, _SEND = "qwen3_dist.unsent", "qwen3_dist.send"


def track_unsent(scope: Scope, send: Send) -> None:
    """Stores in `scope` Serve's `send`, and the messages that were given to it and that Serve has not passed on yet.

    Over gRPC, Serve's proxy takes messages as fast as the client reads them; otherwise it takes them at once.
    """
    scope[_SEND] = send
    unsent = unsent_messages(send)
    if unsent is not None:
        scope[_UNSENT] = unsent


def keeps_unsent(scope: Scope) -> bool:
    """Whether the request came through Serve's own proxy, whose unsent messages `track_unsent` found."""
    return _UNSENT in scope


def _is_behind(scope: Scope) -> bool:
    """Whether more than MAX_UNSENT_BYTES are unsent."""
    unsent: Collection[Any] = scope.get(_UNSENT, ())
    return len(unsent) > 0 and sum([len(message.get("body", b"")) for message in unsent]) > MAX_UNSENT_BYTES


async def _wait_for_client(scope: Scope, timeout_s: float) -> None:
    """Waits until at most MAX_UNSENT_BYTES are unsent. Raises RequestError (408) after `timeout_s` seconds; 0 means no
    timeout."""
    deadline = time.monotonic() + timeout_s
    while _is_behind(scope):
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
        error_events: Callable[[Exception, bytes], bytes],
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
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        # Nothing between here and Serve looks at the parts between the first message and the last.
        with _timed(self._scope.get(_SEND, send), self._timeout_s) as send_now:
            sent = self._first
            if sent:
                await send_now(_part(sent))
            try:
                is_first = True
                async for item in self._items:
                    sent = last_events(item, sent)
                    await send_now(_part(item))
                    if is_first:
                        is_first = False
                        os.sched_yield()  # a proxy on this core sends it before other streams' parts are looked at
                    if _is_behind(self._scope):
                        await _wait_for_client(self._scope, self._timeout_s)
            except QwenDistError as error:
                access_record(self._scope).error_status = error_status(error)
                await send_now(_part(self._error_events(error, sent)))
        async with asyncio.timeout(self._timeout_s or None):
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def _part(body: bytes) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": True}


@contextmanager
def _timed(send: Send, timeout_s: float) -> Iterator[Send]:
    """A context with a `send` that raises TimeoutError once a message has waited for `timeout_s` seconds, as it may
    with HAProxy, where `send` itself waits for the client; 0 means no timeout."""
    if not timeout_s:
        yield send
        return
    timed = _TimedSend(send, timeout_s)
    try:
        yield timed.send
    finally:
        timed.timer.cancel()


class _TimedSend:
    """A `send` with a timeout for each message. One timer serves all of them."""

    def __init__(self, send: Send, timeout_s: float) -> None:
        self._send, self._timeout_s = send, timeout_s
        self._loop, self._interrupt = asyncio.get_running_loop(), Interrupt()
        self._began_s: float | None = None  # when the message that waits was given, by the event loop's clock
        self.timer = self._loop.call_later(timeout_s, self._check)

    async def send(self, message: Message) -> None:
        """Raises TimeoutError."""
        self._began_s = self._loop.time()
        try:
            await self._interrupt.wait(self._send, message)
        except InterruptedWaitError:
            raise TimeoutError from None
        self._began_s = None

    def _check(self) -> None:
        began_s = self._began_s
        left_s = self._timeout_s if began_s is None else began_s + self._timeout_s - self._loop.time()
        if left_s > 0:
            self.timer = self._loop.call_later(left_s, self._check)
        else:
            self._interrupt.fire()


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
