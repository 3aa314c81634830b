"""Graceful shutdown in the ingress: new requests are refused, running ones get a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from http import HTTPStatus
from typing import Any
from weakref import WeakSet

from qwen3_dist.errors import RequestError
from serve_app.ingress.interrupt import Interrupt, InterruptedWaitError

_RETRY_AFTER_S = 5


class DrainingError(RequestError):
    """The service is shutting down (503). The client may retry later."""

    def __init__(self, message: str = "the service is shutting down; send the request again later") -> None:
        super().__init__(message, status=HTTPStatus.SERVICE_UNAVAILABLE)
        self.retry_after_s = _RETRY_AFTER_S

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return type(self), (str(self),)


class Draining:
    """Refuses new requests once `begin` is called, and ends running ones at the deadline."""

    def __init__(self) -> None:
        self._deadline: float | None = None
        self._running = WeakSet[Interrupt]()

    def begin(self, timeout_s: float) -> None:
        """Refuses new requests from now on, and ends running ones after `timeout_s` seconds.

        Another call can only bring the deadline forward.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        if self._deadline is None or deadline < self._deadline:
            self._deadline = deadline
            loop.call_at(deadline, self._end)

    def _end(self) -> None:
        for interrupt in list(self._running):
            interrupt.fire()

    def check(self) -> None:
        """Raises DrainingError if the service is shutting down."""
        if self._deadline is not None:
            raise DrainingError()

    def watch(self, items: AsyncGenerator[Any, None]) -> Watched:
        """Passes on the items of a running request. They raise DrainingError at the deadline."""
        interrupt = Interrupt()
        self._running.add(interrupt)
        if self._deadline is not None and self._deadline <= asyncio.get_running_loop().time():
            interrupt.fire()
        return Watched(items, interrupt)


class Watched:
    """The items of a request, until `interrupt` ends them with DrainingError."""

    def __init__(self, items: AsyncGenerator[Any, None], interrupt: Interrupt) -> None:
        self._items, self._interrupt = items, interrupt

    def __aiter__(self) -> Watched:
        return self

    async def __anext__(self) -> Any:
        try:
            return await self._interrupt.wait(self._items.__anext__)
        except InterruptedWaitError:
            raise DrainingError(
                "the service is shutting down and the request did not end in time; send it again later"
            ) from None

    async def aclose(self) -> None:
        """Cancels the request if it is not done."""
        await self._items.aclose()
