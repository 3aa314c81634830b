"""Keep-alive for streams whose first part is slow: headers are sent early, then pings until the part comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from typing import Any

from serve_app.apis.shared.answer import PING
from serve_app.ingress.dispatch import part_of
from serve_app.ingress.draining import Watched

_HEADERS_AFTER_S = (
    3.0  # an error before that, or before the request is accepted, still gets its own HTTP status
)
_TOLD_S = 1.0  # in which a replica tells that a request has waited too long
KEEP_ALIVE_PERIOD_S = 10.0  # proxies close connections that are idle for a minute


def headers_after_s(queue_timeout_s: float) -> float:
    """Seconds after which a stream's headers are sent though it has not begun. With a queue timeout they wait for it,
    so that a request that has waited too long gets an HTTP status of its own."""
    return max(_HEADERS_AFTER_S, queue_timeout_s + _TOLD_S if queue_timeout_s else 0.0)


class KeepAliveStream:
    """Iterates over the parts of a stream, and yields `ping` every `period_s` seconds until the first.

    The first of `items` is a pair of HTTP status and part, the others are parts. The part of the pair is empty for a
    stream that is accepted and has nothing to send yet.
    """

    def __init__(
        self,
        items: AsyncGenerator[Any, None] | Watched,
        ping: bytes = PING,
        period_s: float = KEEP_ALIVE_PERIOD_S,
    ) -> None:
        self._items = items
        self._ping = ping
        self._period_s = period_s
        self._begun = False
        self._waiter: asyncio.Future[None] | None = None
        self._next: asyncio.Task[Any] | None = asyncio.create_task(self._read())

    async def _read(self) -> Any:
        try:
            return await anext(self._items)
        finally:
            self._wake()  # a turn of the event loop earlier than the callbacks of this task, which `wait` uses

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _read_within(self, timeout_s: float | None) -> Any:
        """The next item; None if it takes longer than `timeout_s` seconds."""
        self._next = self._next or asyncio.create_task(self._read())
        if not self._next.done():
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = loop.call_later(timeout_s, self._wake) if timeout_s is not None else None
            try:
                await self._waiter
            finally:
                if timer is not None:
                    timer.cancel()
            if not self._next.done():
                return None
        item, self._next = self._next.result(), None
        return item

    async def first(self, timeout_s: float | None) -> tuple[int, bytes] | None:
        """The first item; None if it takes longer than `timeout_s` seconds. Raises the errors of `items`."""
        item: tuple[int, bytes] | None = await self._read_within(timeout_s)
        self._begun = item is not None and bool(item[1])
        return item

    def __aiter__(self) -> KeepAliveStream:
        return self

    def __anext__(self) -> Awaitable[bytes]:
        """Raises RequestError if the request failed before its first part, else the errors of `items`."""
        return self._items.__anext__() if self._begun else self._until_begun()

    async def _until_begun(self) -> bytes:
        while True:
            item = await self._read_within(self._period_s)
            if item is None:
                return self._ping
            part: bytes = part_of(*item) if isinstance(item, tuple) else item
            if part:
                self._begun = True
                return part

    async def aclose(self) -> None:
        """Cancels the request if it is not done."""
        if self._next is not None:
            self._next.cancel()
            await asyncio.gather(self._next, return_exceptions=True)
        await self._items.aclose()
