"""Ends what a task waits for, from outside of it.

`asyncio.timeout` does so too. But it makes a timer for each wait, and a stream waits twice for each of its parts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


class InterruptedWaitError(Exception):
    """The wait was ended by `Interrupt.fire`."""


class Interrupt:
    """Ends all waits of one stream, which follow each other: that of now, and those to come."""

    def __init__(self) -> None:
        self._task: asyncio.Task[object] | None = None  # that waits
        self._fired = self._cancelled = False

    def fire(self) -> None:
        """Ends the wait."""
        self._fired = True
        if self._task is not None and not self._cancelled:
            self._cancelled = self._task.cancel()

    async def wait(self, work: Callable[..., Awaitable[T]], *arguments: object) -> T:
        """What `work` returns. Raises InterruptedWaitError once `fire` was called, and has cancelled `work` then."""
        if self._fired:
            raise InterruptedWaitError
        self._task = task = asyncio.current_task()
        try:
            return await work(*arguments)
        except asyncio.CancelledError:
            if self._cancelled and task is not None and not task.uncancel():
                raise InterruptedWaitError from None
            raise
        finally:
            self._task = None
