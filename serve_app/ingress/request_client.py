"""The ingress's side of the connections that carry requests (`serve_app/request_frames.py`)."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from itertools import count
from typing import Any, cast

from qwen3_dist.engine.request_stream import WakesInTurns
from qwen3_dist.errors import EngineDeadError
from serve_app.apis.shared.answer import Counted
from serve_app.request_frames import (
    CANCEL,
    COMMAND,
    END,
    HOLD,
    LENGTH,
    SEND,
    START,
    ReplicaAddress,
    end_if_dead,
)
from serve_app.telemetry.summary import LastPart

CONNECT_TIMEOUT_S = 10.0
_WAKES_PER_TURN = 4  # fewer than a replica has, since a new stream needs several turns to send its first part
MAX_UNREAD_BYTES = 2**16  # of one answer, at which the replica is told to hold it
_LOST = "the connection to the replica that ran this request was lost; send it again"


class RequestClient:
    """The connections of this ingress, one to each replica that it has sent a request."""

    def __init__(self) -> None:
        self._opening: dict[ReplicaAddress, asyncio.Task[Connection]] = {}
        self._open: dict[ReplicaAddress, Connection] = {}

    def connection(self, address: ReplicaAddress) -> Connection | None:
        """The connection to a replica, if there is one."""
        return self._open.get(address)

    async def connect(self, address: ReplicaAddress) -> Connection:
        """The connection to a replica. Raises EngineDeadError if it is not reached."""
        if address in self._open:
            return self._open[address]
        if address not in self._opening:
            self._opening[address] = asyncio.create_task(self._connect(address))
        try:
            return await asyncio.shield(self._opening[address])
        except OSError as error:
            raise EngineDeadError(f"{_LOST} ({error or type(error).__name__})") from None

    async def _connect(self, address: ReplicaAddress) -> Connection:
        def forget() -> None:
            self._open.pop(address, None)

        loop = asyncio.get_running_loop()
        create = loop.create_connection(lambda: Connection(forget), address.host, address.port)
        try:
            transport, connection = await asyncio.wait_for(create, CONNECT_TIMEOUT_S)
        finally:
            del self._opening[address]
        transport.write(address.secret)
        self._open[address] = connection
        return connection


class Connection(asyncio.Protocol):
    """The connection to one replica. `forget` is called when it is lost."""

    def __init__(self, forget: Callable[[], None]) -> None:
        self._forget = forget
        self._received = bytearray()
        self._numbers = count(1)
        self._is_lost = False
        self._wakes = WakesInTurns(_WAKES_PER_TURN)
        self.calls: dict[int, Call] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it
        end_if_dead(self._transport)

    def start(self, call: Call, payload: bytes) -> int:
        """Sends the request of a call, and returns its number."""
        number = next(self._numbers)
        self.calls[number] = call
        self.command(START, number, payload)
        if self._is_lost:
            call.lose()
        return number

    def command(self, command: int, number: int, payload: bytes = b"") -> None:
        """Tells the replica what to do about a request. Does nothing once the connection is closed, on which uvloop
        would raise RuntimeError."""
        if not self._transport.is_closing():
            self._transport.write(COMMAND.pack(command, number, len(payload)) + payload)

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        start = 0
        while len(received) - start >= LENGTH.size:
            (length,) = LENGTH.unpack_from(received, start)
            end = start + LENGTH.size + length
            if len(received) < end:
                break
            for number, item in pickle.loads(memoryview(received)[start + LENGTH.size : end]):
                if call := self.calls.get(number):
                    if call.has_begun:
                        self._wakes.add(call.wake)
                    else:
                        call.wake()
                    call.put(Counted._make(item) if type(item) is tuple else item)
            start = end
        del received[:start]

    def connection_lost(self, error: Exception | None) -> None:
        self._is_lost = True
        self._forget()
        for call in list(self.calls.values()):
            call.lose()


class Call:
    """One request at one replica. Iterates over the items of the answer; what arrived since the last part of a stream
    comes as one part.

    `opening` sends the request, with `start`. The items raise what it raises, and EngineDeadError if the connection is
    lost or the call is cancelled.
    """

    def __init__(self, opening: asyncio.Task[None] | None = None) -> None:
        self._opening = opening
        self._connection: Connection | None = None
        self._number = 0
        self._items: list[Any] = []
        self._size = 0
        self._is_held = self._is_lost = self._has_ended = False
        self.has_begun = False  # whether a part of the answer has arrived
        self._waiter: asyncio.Future[None] | None = None
        self._on_end: Callable[[], None] = lambda: None

    def start(self, connection: Connection, payload: bytes, on_end: Callable[[], None]) -> None:
        """Sends the request. `on_end` is called once, when the call is cancelled."""
        self._connection, self._on_end = connection, on_end
        self._number = connection.start(self, payload)

    def put(self, item: Any) -> None:
        """Adds an item that has arrived. The caller calls `wake`, before or after."""
        if isinstance(item, Counted):
            self._items.append(item)
            self.has_begun = self.has_begun or _is_part(item)
            self._size += len(item.item)
            if self._size > MAX_UNREAD_BYTES and not self._is_held:
                self._is_held = True
                self._command(HOLD)
        elif item == END:
            self._has_ended = True
        else:
            self._items.append(item.value)

    def lose(self) -> None:
        """Says that no more items will arrive."""
        self._is_lost = True
        self.wake()

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> Any:
        if self._opening is not None:
            await self._until_open(self._opening)
        while not self._items:
            if self._has_ended:
                raise StopAsyncIteration
            if self._is_lost:
                raise EngineDeadError(_LOST)
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._take()

    async def _until_open(self, opening: asyncio.Task[None]) -> None:
        try:
            await opening
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._is_lost or (task is not None and task.cancelling()):
                raise
            raise EngineDeadError(_LOST) from None  # this call was cancelled, and not who waits for it
        self._opening = None

    def cancel(self) -> None:
        """Ends the request, if it has not ended."""
        if self._opening is not None:
            self._opening.cancel()
        if self._connection is not None:
            if not self._has_ended:
                self._command(CANCEL)
            del self._connection.calls[self._number]
            self._connection = None
            self._on_end()
        self.lose()

    def _command(self, command: int) -> None:
        if self._connection is not None:
            self._connection.command(command, self._number)

    def wake(self) -> None:
        """Has the task that waits for items go on."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _take(self) -> Any:
        items, taken = self._items, 1
        if _is_part(items[0]):
            while taken < len(items) and _is_part(items[taken]):
                taken += 1
        self._items = items[taken:]
        if not self._items:
            self._size = 0
            if self._is_held:
                self._is_held = False
                self._command(SEND)
        return items[0] if taken == 1 else _joined(items[:taken])


def _is_part(item: Any) -> bool:
    return isinstance(item, Counted) and isinstance(item.item, bytes)


def _joined(parts: list[Counted]) -> Counted:
    last = parts[-1]
    joined = b"".join(part.item for part in parts)
    return last._replace(
        item=LastPart.of(joined, last.item.summary) if isinstance(last.item, LastPart) else joined,
        sent=tuple(delta for part in parts for delta in part.sent),
    )
