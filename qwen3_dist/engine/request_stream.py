"""What the engine's thread hands to the event loop of a request's caller."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from qwen3_dist.errors import EngineDeadError, QueueTimeoutError, QwenDistError, RequestError
from qwen3_dist.protocol.outputs import TokenDelta

T = TypeVar("T")


@dataclass(eq=False)
class RequestStream:
    """The queue of one request's deltas, on the event loop of its caller."""

    loop: asyncio.AbstractEventLoop
    held: list[TokenDelta] = field(default_factory=list)
    due: float = 0.0  # when the next part may be sent
    queue: asyncio.Queue[list[TokenDelta] | QwenDistError] = field(default_factory=asyncio.Queue)
    unfinished: int = 1
    _timer: asyncio.TimerHandle | None = None
    _failed: str | None = None  # why a choice failed

    async def next_deltas(self) -> list[TokenDelta]:
        """Waits for deltas and returns all since the last call. A caller slower than the engine gets several steps at
        once, so it has less work for each. Raises RequestError if a choice has failed, QueueTimeoutError if that was
        sent, and EngineDeadError after the last delta before the engine's death."""
        if self._failed is not None:
            raise RequestError(self._failed)
        taken: list[TokenDelta] = []
        while not taken or not self.queue.empty():
            item = await self.queue.get()
            if not isinstance(item, QwenDistError):
                taken += item
            elif taken:
                self.queue.put_nowait(item)  # nothing follows it, so the next call finds it
                break
            else:
                raise item if isinstance(item, QueueTimeoutError) else EngineDeadError(str(item))
        self._failed = next((delta.error for delta in taken if delta.error is not None), None)
        if self._failed is not None:
            good = [delta for delta in taken if delta.error is None]
            return good or await self.next_deltas()
        self.unfinished -= sum(delta.finish_reason is not None for delta in taken)
        return taken

    def call_later(self, delay_s: float, call: Callable[[], object]) -> None:
        """Calls `call` on the event loop after `delay_s` seconds, unless `cancel_call` comes first."""
        self._timer = self.loop.call_later(delay_s, call)

    def cancel_call(self) -> None:
        """Ends what `call_later` began, if anything."""
        if self._timer is not None:
            self._timer.cancel()

    def send(self, item: list[TokenDelta] | QwenDistError) -> None:
        """Puts an item into the queue, from another thread."""
        call_soon(self.loop, self.queue.put_nowait, item)


def call_soon(loop: asyncio.AbstractEventLoop, function: Callable[[T], object], argument: T) -> None:
    """Calls `function` on the event loop, from another thread; does nothing if nobody listens there any more."""
    with contextlib.suppress(RuntimeError):  # the event loop is closed
        loop.call_soon_threadsafe(function, argument)


def put_all(parts: list[tuple[RequestStream, list[TokenDelta]]]) -> None:
    """Puts each stream's deltas into its queue, on the event loop of all these streams."""
    for stream, deltas in parts:
        stream.queue.put_nowait(deltas)
