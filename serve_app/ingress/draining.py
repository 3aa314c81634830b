"""Graceful shutdown in the ingress: new requests are refused, running ones get a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from http import HTTPStatus
from typing import TypeVar

from qwen3_dist.errors import RequestError

T = TypeVar("T")
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
        self._waits: set[asyncio.Timeout] = set()

    def begin(self, timeout_s: float) -> None:
        """Refuses new requests from now on, and ends running ones after `timeout_s` seconds.

        Another call can only bring the deadline forward.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        if self._deadline is None or deadline < self._deadline:
            self._deadline = deadline
            for wait in self._waits:
                if not wait.expired():
                    wait.reschedule(deadline)

    def check(self) -> None:
        """Raises DrainingError if the service is shutting down."""
        if self._deadline is not None:
            raise DrainingError()

    async def watch(self, items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """Passes on the items of a running request. Raises DrainingError at the deadline."""
        async with aclosing(items):
            while True:
                try:
                    async with asyncio.timeout_at(self._deadline) as wait:
                        self._waits.add(wait)
                        try:
                            item = await anext(items)
                        finally:
                            self._waits.discard(wait)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    if not wait.expired():
                        raise
                    raise DrainingError(
                        "the service is shutting down and the request did not end in time; send it again later"
                    ) from None
                yield item
