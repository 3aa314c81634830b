"""Keep-alive for streams whose first part is slow: headers are sent early, then comments until the part comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from http import HTTPStatus
from typing import Any

import pydantic_core

from qwen3_dist.errors import RequestError

KEEP_ALIVE_COMMENT = b": waiting\n\n"  # a comment line of server-sent events, which clients ignore
HEADERS_AFTER_S = 3.0  # an error before that still gets its own HTTP status
KEEP_ALIVE_PERIOD_S = 10.0  # proxies close connections that are idle for a minute


class KeepAliveStream:
    """Iterates over the parts of a stream, and yields a keep-alive comment every `period_s` seconds until the first.

    The first of `items` is a pair of HTTP status and part, the others are parts.
    """

    def __init__(self, items: AsyncGenerator[Any, None], period_s: float = KEEP_ALIVE_PERIOD_S) -> None:
        self._items = items
        self._period_s = period_s
        self._first: asyncio.Future[Any] | None = asyncio.ensure_future(anext(items))

    async def first(self, timeout_s: float | None) -> tuple[int, bytes] | None:
        """The first item; None if it takes longer than `timeout_s` seconds. Raises the errors of `items`."""
        assert self._first is not None
        await asyncio.wait([self._first], timeout=timeout_s)
        if not self._first.done():
            return None
        done, self._first = self._first, None
        item: tuple[int, bytes] = done.result()
        return item

    def __aiter__(self) -> KeepAliveStream:
        return self

    async def __anext__(self) -> bytes:
        """Raises RequestError if the request failed before its first part, else the errors of `items`."""
        if self._first is None:
            part: bytes = await anext(self._items)
            return part
        item = await self.first(self._period_s)
        if item is None:
            return KEEP_ALIVE_COMMENT
        status, part = item
        if status != HTTPStatus.OK:
            error = pydantic_core.from_json(part)["error"]
            raise RequestError(error["message"], error.get("param"), status, error.get("code"))
        return part

    async def aclose(self) -> None:
        """Cancels the request if it is not done."""
        if self._first is not None:
            self._first.cancel()
            await asyncio.gather(self._first, return_exceptions=True)
        await self._items.aclose()
