"""A stream whose first part takes long: its headers go out before it, and comments keep its connection alive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from http import HTTPStatus
from typing import Any

import pydantic_core

from qwen3_dist.errors import RequestError

COMMENT = b": waiting\n\n"  # which readers of server-sent events pass over
HEADERS_AFTER_S = 3.0  # until then an error has a status of its own
COMMENT_EVERY_S = 10.0  # proxies end connections that are idle for a minute


class LateStream:
    """The parts of `items`, whose first item is a pair of HTTP status and part, with a comment each `pause_s` seconds
    ahead of the first.
    """

    def __init__(self, items: AsyncGenerator[Any, None], pause_s: float = COMMENT_EVERY_S) -> None:
        self._items = items
        self._pause_s = pause_s
        self._first: asyncio.Future[Any] | None = asyncio.ensure_future(anext(items))

    async def first(self, timeout_s: float | None) -> tuple[int, bytes] | None:
        """The first item, None if it takes longer than that. Raises what `items` do."""
        assert self._first is not None
        await asyncio.wait([self._first], timeout=timeout_s)
        if not self._first.done():
            return None
        done, self._first = self._first, None
        item: tuple[int, bytes] = done.result()
        return item

    def __aiter__(self) -> LateStream:
        return self

    async def __anext__(self) -> bytes:
        """Raises RequestError, or what `items` do, if the request failed before its first part."""
        if self._first is None:
            part: bytes = await anext(self._items)
            return part
        item = await self.first(self._pause_s)
        if item is None:
            return COMMENT
        status, part = item
        if status != HTTPStatus.OK:
            told = pydantic_core.from_json(part)["error"]
            raise RequestError(told["message"], told.get("param"), status, told.get("code"))
        return part

    async def aclose(self) -> None:
        """Cancels the request if it is not done."""
        if self._first is not None:
            self._first.cancel()
            await asyncio.gather(self._first, return_exceptions=True)
        await self._items.aclose()
