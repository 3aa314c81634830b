"""What the engine's thread hands to the event loop of a request's caller."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TypeVar

from qwen3_dist.errors import EngineDeadError, QueueTimeoutError, QwenDistError, RequestError
from qwen3_dist.protocol.outputs import TokenDelta

T = TypeVar("T")
_WAKES_PER_TURN = 16  # whose parts go to the ingress as one message


@dataclass(eq=False)
class RequestStream:
    """One request's deltas on their way to the event loop of its caller. One task waits for them.

    `begun` once a step has held one of its choices. `on_wait` is called on the event loop: with True if that is not so
    when the stream is asked to `tell_wait`, and with False when it becomes so afterwards.
    """

    loop: asyncio.AbstractEventLoop
    unfinished: int = 1
    on_wait: Callable[[bool], object] = lambda waits: None
    held: list[TokenDelta] = field(default_factory=list)
    due: float = 0.0  # when the next part may be sent
    begun: bool = False
    has_sent: bool = False  # whether `send_due` has sent a part
    _was_asked: bool = False  # to `tell_wait`
    _timers: list[asyncio.TimerHandle] = field(default_factory=list)
    _arrived: list[TokenDelta] = field(default_factory=list)
    _end: QwenDistError | None = None  # why nothing more arrives
    _failed: str | None = None  # why a choice failed
    _waiter: asyncio.Future[None] | None = None

    async def next_deltas(self) -> list[TokenDelta]:
        """Waits for deltas and returns all since the last call. A caller slower than the engine gets several steps at
        once, so it has less work for each. Raises RequestError if a choice has failed, QueueTimeoutError if that was
        sent, and EngineDeadError after the last delta before the engine's death."""
        if self._failed is not None:
            raise RequestError(self._failed)
        while not self._arrived:
            if self._end is not None:
                raise (
                    self._end if isinstance(self._end, QueueTimeoutError) else EngineDeadError(str(self._end))
                )
            self._waiter = self.loop.create_future()
            await self._waiter
        taken, self._arrived = self._arrived, []
        self._count_ended(taken)
        if self._failed is None:
            return taken
        good = [delta for delta in taken if delta.error is None]
        return good or await self.next_deltas()

    def _count_ended(self, deltas: list[TokenDelta]) -> None:
        """Counts the choices that end with `deltas`, and keeps why one failed."""
        for delta in deltas:
            if delta.error is not None:
                self._failed = self._failed or delta.error
            elif delta.finish_reason is not None:
                self.unfinished -= 1

    def put(self, item: list[TokenDelta] | QwenDistError) -> None:
        """Adds deltas, or why nothing follows, on the event loop."""
        self.add(item)
        self.wake()

    def add(self, item: list[TokenDelta] | QwenDistError) -> None:
        """As `put`, for a caller that calls `wake` later."""
        if isinstance(item, QwenDistError):
            self._end = item
            self.tell_wait()
        else:
            self._arrived += item

    def wake(self) -> None:
        """Has the task that waits go on."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def call_later(self, delay_s: float, call: Callable[[], object]) -> None:
        """Calls `call` on the event loop after `delay_s` seconds, unless `cancel_calls` comes first."""
        self._timers.append(self.loop.call_later(delay_s, call))

    def cancel_calls(self) -> None:
        """Ends what `call_later` began."""
        for timer in self._timers:
            timer.cancel()

    def tell_wait(self) -> None:
        """Calls `on_wait` if no step has held the request yet, on the event loop."""
        if not self._was_asked:
            self._was_asked = True  # before `begun` is read, which `begin` sets before it reads this
            if not self.begun:
                self.on_wait(True)

    def begin(self) -> None:
        """Notes that a step is about to hold the request, from the engine's thread."""
        if not self.begun:
            self.begun = True
            if self._was_asked:
                call_soon(self.loop, self.on_wait, False)

    def send(self, item: list[TokenDelta] | QwenDistError) -> None:
        """Adds an item, from another thread."""
        call_soon(self.loop, self.put, item)


TAKE_S = 0.005  # the longest time that an engine gives an event loop for first parts
_Parts = list[tuple[RequestStream, list[TokenDelta]]]


def call_soon(loop: asyncio.AbstractEventLoop, function: Callable[[T], object], argument: T) -> None:
    """Calls `function` on the event loop, from another thread; does nothing if nobody listens there any more."""
    with contextlib.suppress(RuntimeError):  # the event loop is closed
        loop.call_soon_threadsafe(function, argument)


def send_due(
    streams: Collection[RequestStream], parts_per_s: float, taken: threading.Event | None = None
) -> bool:
    """Sends what the streams hold and is due, from another thread: so that all get about `parts_per_s` parts a second
    at most, beside last ones. Returns whether first parts are among it. `taken` is set once an event loop has sent
    them."""
    now = time.monotonic()
    parts: dict[asyncio.AbstractEventLoop, _Parts] = {}
    has_first = False
    if taken is not None:
        taken.clear()
    for stream in streams:
        if stream.held and (now >= stream.due or any(delta.is_last for delta in stream.held)):
            parts.setdefault(stream.loop, []).append((stream, stream.held))
            stream.held = []
            has_first = has_first or not stream.has_sent
            stream.due = now + len(streams) / parts_per_s
    for loop, of_loop in parts.items():  # one call for all, since each wakes the loop with a system call
        call_soon(loop, functools.partial(_put_all, of_loop), taken)
    return has_first


def _put_all(parts: _Parts, taken: threading.Event | None) -> None:
    """Adds each stream's deltas, on the event loop of all these streams. Those that wait for their first part go on
    first, since a client waits for its first token longer than for all others. What they put is sent before the
    others go on, since these are woken by what is called after them."""
    loop, others, begun = asyncio.get_running_loop(), WakesInTurns(_WAKES_PER_TURN), []
    for stream, deltas in parts:
        stream.add(deltas)
        if stream.has_sent:
            begun.append(stream.wake)
        else:
            stream.has_sent = True
            stream.wake()
    if taken is not None:  # two turns later, when first parts are sent
        loop.call_soon(loop.call_soon, taken.set)
    for wake in begun:
        others.add(wake)


class WakesInTurns:
    """Calls what is added to it in that order, `per_turn` in each of the next turns of the event loop. So what was
    woken before, and what arrives meanwhile, such as a new request, waits for a few streams and not for all that go
    on in a step."""

    def __init__(self, per_turn: int) -> None:
        self._per_turn = per_turn
        self._waiting: deque[Callable[[], object]] = deque()

    def add(self, wake: Callable[[], object]) -> None:
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._run)
        self._waiting.append(wake)

    def _run(self) -> None:
        for _ in range(min(len(self._waiting), self._per_turn)):
            self._waiting.popleft()()
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._run)
