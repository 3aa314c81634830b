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
        self._next: asyncio.Future[Any] | None = asyncio.ensure_future(anext(items))

    async def first(self, timeout_s: float | None) -> tuple[int, bytes] | None:
        """The first item; None if it takes longer than `timeout_s` seconds. Raises the errors of `items`."""
        assert self._next is not None
        await asyncio.wait([self._next], timeout=timeout_s)
        if not self._next.done():
            return None
        item: tuple[int, bytes] = self._next.result()
        self._next, self._begun = None, bool(item[1])
        return item

    def __aiter__(self) -> KeepAliveStream:
        return self

    def __anext__(self) -> Awaitable[bytes]:
        """Raises RequestError if the request failed before its first part, else the errors of `items`."""
        return self._items.__anext__() if self._begun else self._until_begun()

    async def _until_begun(self) -> bytes:
        while True:
            self._next = self._next or asyncio.ensure_future(anext(self._items))
            await asyncio.wait([self._next], timeout=self._period_s)
            if not self._next.done():
                return self._ping
            item, self._next = self._next.result(), None
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
