"""The ingress's side of the connections that carry the parts of streams (`serve_app/part_frames.py`)."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, Self, cast

from qwen3_dist.errors import EngineDeadError
from serve_app.apis.shared.answer import Counted
from serve_app.part_frames import COMMAND, HOLD, LENGTH, SEND, PartsAt, PartsSent, end_if_dead
from serve_app.telemetry.summary import LastPart

CONNECT_TIMEOUT_S = 10.0
MAX_UNREAD_BYTES = 2**16  # of one stream, at which the replica is told to hold it
_LOST = "the connection to the replica that ran this request was lost; send it again"


class PartClient:
    """The connections of this ingress, one to each replica that has sent it parts."""

    def __init__(self) -> None:
        self._connections: dict[tuple[str, int], asyncio.Task[_Connection]] = {}

    @asynccontextmanager
    async def receive(self, at: PartsAt) -> AsyncIterator[PartReceiver]:
        """A context in which the parts of a stream arrive. Raises EngineDeadError if the replica is not reached."""
        connection = await self._connect(at)
        receiver = PartReceiver(connection, at.stream)
        if connection.is_lost:
            receiver.lose()
        connection.receivers[at.stream] = receiver
        connection.command(SEND, at.stream)
        try:
            yield receiver
        finally:
            receiver.close()
            del connection.receivers[at.stream]

    async def _connect(self, at: PartsAt) -> _Connection:
        key = (at.host, at.port)
        if key not in self._connections:
            self._connections[key] = asyncio.create_task(self._open(at))
        try:
            return await asyncio.shield(self._connections[key])
        except OSError as error:
            raise EngineDeadError(f"{_LOST} ({error or type(error).__name__})") from None

    async def _open(self, at: PartsAt) -> _Connection:
        def forget() -> None:
            self._connections.pop((at.host, at.port), None)

        create = asyncio.get_running_loop().create_connection(lambda: _Connection(forget), at.host, at.port)
        try:
            transport, connection = await asyncio.wait_for(create, CONNECT_TIMEOUT_S)
        except OSError:
            forget()
            raise
        transport.write(at.secret)
        return connection


class PartReceiver:
    """The parts of one stream that have arrived and were not taken yet. Iterates over them after `until`."""

    def __init__(self, connection: _Connection, stream: int) -> None:
        self._connection, self._stream = connection, stream
        self._parts: list[Counted] = []
        self._size = 0
        self._num_parts = 0
        self._is_held = self._is_lost = False
        self._end: asyncio.Future[Any] | None = None
        self._error: Exception | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, part: Counted) -> None:
        """Adds a part that has arrived."""
        self._parts.append(part)
        self._num_parts += 1
        self._size += len(part.item)
        if self._size > MAX_UNREAD_BYTES and not self._is_held:
            self._is_held = True
            self._connection.command(HOLD, self._stream)
        self._wake()

    def lose(self) -> None:
        """Says that no more parts will arrive."""
        self._is_lost = True
        self._wake()

    def until(
        self, ending: Awaitable[Any], limit_s: float | None = None, late: Exception | None = None
    ) -> Self:
        """The parts of the stream until `ending` returns PartsSent and all of these have arrived. What arrived since
        the last part comes as one part. If `ending` returns something else, that is the last item.

        They raise what `ending` raises, EngineDeadError if the connection is lost, and `late` once nothing has arrived
        at `limit_s`, a time of the event loop's clock, or later. `close` cancels `ending`.
        """
        self._end = asyncio.ensure_future(ending)
        self._end.add_done_callback(lambda _: self._wake())
        if limit_s is not None and late is not None:
            self._timer = asyncio.get_running_loop().call_at(limit_s, self._fail, late)
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        while not self._parts:
            if self._end is None:
                raise StopAsyncIteration
            if self._end.done():
                result = self._end.result()
                if result is None:
                    raise EngineDeadError(_LOST)
                if not isinstance(result, PartsSent):
                    self._end = None
                    return result
                if result.num_parts == self._num_parts:
                    raise StopAsyncIteration
            if self._is_lost:
                raise EngineDeadError(_LOST)
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._take()

    def close(self) -> None:
        """Ends what `until` has begun."""
        if self._timer is not None:
            self._timer.cancel()
        if self._end is not None and not self._end.cancel() and not self._end.cancelled():
            self._end.exception()  # asyncio warns of exceptions that nobody looked at

    def _fail(self, error: Exception) -> None:
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _take(self) -> Counted:
        parts, self._parts, self._size = self._parts, [], 0
        if self._is_held:
            self._is_held = False
            self._connection.command(SEND, self._stream)
        last = parts[-1]
        if len(parts) == 1:
            return last
        joined = b"".join(part.item for part in parts)
        return last._replace(
            item=LastPart.of(joined, last.item.summary) if isinstance(last.item, LastPart) else joined,
            sent=tuple(delta for part in parts for delta in part.sent),
        )


class _Connection(asyncio.Protocol):
    """The connection to one replica. `forget` is called when it is lost."""

    def __init__(self, forget: Any) -> None:
        self._forget = forget
        self._received = bytearray()
        self.is_lost = False
        self.receivers: dict[int, PartReceiver] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it
        end_if_dead(self._transport)

    def command(self, command: int, stream: int) -> None:
        """Tells the replica to send a stream's parts, or to hold them. Does nothing once the connection is closed, on
        which uvloop would raise RuntimeError."""
        if not self._transport.is_closing():
            self._transport.write(COMMAND.pack(command, stream))

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        start = 0
        while len(received) - start >= LENGTH.size:
            (length,) = LENGTH.unpack_from(received, start)
            end = start + LENGTH.size + length
            if len(received) < end:
                break
            for stream, part in pickle.loads(memoryview(received)[start + LENGTH.size : end]):
                if receiver := self.receivers.get(stream):
                    receiver.put(Counted._make(part))
            start = end
        del received[:start]

    def connection_lost(self, error: Exception | None) -> None:
        self.is_lost = True
        self._forget()
        for receiver in list(self.receivers.values()):
            receiver.lose()
