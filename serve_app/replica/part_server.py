"""The replica's side of the connections that carry the parts of streams (`serve_app/part_frames.py`)."""

from __future__ import annotations

import asyncio
import hmac
import pickle
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, cast

from qwen3_dist.errors import EngineDeadError
from serve_app.apis.shared.answer import Counted
from serve_app.part_frames import COMMAND, LENGTH, SECRET_BYTES, SEND, PartsAt, end_if_dead

SECRET_TIMEOUT_S = 10.0  # a connection that has not sent the secret by then is closed
CONNECT_TIMEOUT_S = 60.0  # an ingress asks for the parts of a stream as soon as it knows of it
_MAX_OUTBOX_BYTES = 2**18  # made in one turn of the event loop


class PartServer:
    """Listens on a free port of `host` for the ingresses, from `start` on."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._secret = secrets.token_bytes(SECRET_BYTES)
        self._numbers = count(1)
        self._senders: dict[int, PartSender] = {}
        self._listening: asyncio.Task[asyncio.Server] | None = None

    async def start(self) -> None:
        """Listens, if it does not yet. Raises OSError if it cannot."""
        if self._listening is None:
            create = asyncio.get_running_loop().create_server(lambda: _Connection(self), self._host, 0)
            self._listening = asyncio.ensure_future(create)
        await asyncio.shield(self._listening)

    @contextmanager
    def sender(self) -> Iterator[PartSender]:
        """A context in which the parts of one stream are sent. Call `start` before."""
        assert self._listening is not None
        host, port = self._listening.result().sockets[0].getsockname()[:2]
        number = next(self._numbers)
        self._senders[number] = sender = PartSender(PartsAt(host, port, self._secret, number))
        timer = asyncio.get_running_loop().call_later(CONNECT_TIMEOUT_S, sender.lose_unless_connected)
        try:
            yield sender
        finally:
            timer.cancel()
            del self._senders[number]
            sender.connect(None)

    def find(self, stream: int) -> PartSender | None:
        """The sender of a stream; None if the stream has ended."""
        return self._senders.get(stream)

    def knows(self, secret: bytes) -> bool:
        """Whether `secret` is this server's."""
        return hmac.compare_digest(secret, self._secret)


class PartSender:
    """Sends the parts of one stream to the ingress that has asked for them."""

    def __init__(self, at: PartsAt) -> None:
        self.at = at
        self.num_parts = 0
        self._connection: _Connection | None = None
        self._is_held = True
        self._is_lost = False
        self.may_send = False  # or nobody takes parts, which `send` says
        self._changed = asyncio.Event()

    async def send(self, part: Counted) -> None:
        """Sends a part, once the ingress takes parts of this stream.

        Raises EngineDeadError if the ingress has closed its connection, or none asks in time: it may have been killed,
        and then nobody cancels its requests.
        """
        while not self.may_send:
            self._changed.clear()
            await self._changed.wait()
        if self._is_lost:
            raise EngineDeadError("the connection to the ingress that asked for this stream was lost")
        assert self._connection is not None
        self._connection.put(self.at.stream, part)
        self.num_parts += 1

    def connect(self, connection: _Connection | None) -> None:
        """Sends by `connection` from now on; None: waits for another one."""
        if self._connection is not None:
            self._connection.senders.discard(self)
        self._connection = connection
        if connection is not None:
            connection.senders.add(self)
        self.update()

    def lose(self) -> None:
        """Says that nobody takes parts any more."""
        self.connect(None)
        self._is_lost = True
        self.update()

    def lose_unless_connected(self) -> None:
        """Says that nobody takes parts, if no ingress has asked for them yet."""
        if self._connection is None:
            self.lose()

    def hold(self, is_held: bool) -> None:
        """Sends no parts while `is_held`."""
        self._is_held = is_held
        self.update()

    def update(self) -> None:
        """Decides again whether parts may be sent."""
        self.may_send = self._is_lost or (
            self._connection is not None and self._connection.is_writable and not self._is_held
        )
        if self.may_send:
            self._changed.set()


class _Connection(asyncio.Protocol):
    """The connection of one ingress."""

    def __init__(self, server: PartServer) -> None:
        self._server = server
        self._received = bytearray()
        self._is_known = False
        self._outbox: list[tuple[int, tuple[Any, ...]]] = []
        self._outbox_bytes = 0
        self._is_paused = False
        self.senders: set[PartSender] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it
        end_if_dead(self._transport)
        self._timer = asyncio.get_running_loop().call_later(SECRET_TIMEOUT_S, self._transport.abort)

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self._is_known:
            if len(self._received) < SECRET_BYTES:
                return
            if not self._server.knows(bytes(self._received[:SECRET_BYTES])):
                self._transport.abort()
                return
            self._is_known = True
            self._timer.cancel()
            del self._received[:SECRET_BYTES]
        while len(self._received) >= COMMAND.size:
            command, stream = COMMAND.unpack_from(self._received)
            del self._received[: COMMAND.size]
            if sender := self._server.find(stream):
                if sender not in self.senders:
                    sender.connect(self)
                sender.hold(command != SEND)

    @property
    def is_writable(self) -> bool:
        """Whether the ingress keeps up with what is sent."""
        return not self._is_paused and self._outbox_bytes < _MAX_OUTBOX_BYTES

    def put(self, stream: int, part: Counted) -> None:
        """Sends a part, together with all others of this turn of the event loop."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append((stream, tuple(part)))  # a plain tuple is pickled in half the time
        self._outbox_bytes += len(part.item)
        if self._outbox_bytes >= _MAX_OUTBOX_BYTES:
            self._update_senders()

    def _flush(self) -> None:
        frame = pickle.dumps(self._outbox, pickle.HIGHEST_PROTOCOL)
        was_full = not self.is_writable
        self._outbox, self._outbox_bytes = [], 0
        if not self._transport.is_closing():  # uvloop raises RuntimeError then
            self._transport.write(LENGTH.pack(len(frame)) + frame)  # may call pause_writing
        if was_full:
            self._update_senders()

    def pause_writing(self) -> None:
        self._is_paused = True
        self._update_senders()

    def resume_writing(self) -> None:
        self._is_paused = False
        self._update_senders()

    def connection_lost(self, error: Exception | None) -> None:
        self._timer.cancel()
        for sender in list(self.senders):
            sender.lose()

    def _update_senders(self) -> None:
        for sender in self.senders:
            sender.update()
