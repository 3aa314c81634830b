"""The replica's side of the connections that carry requests (`serve_app/request_frames.py`)."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import pickle
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from http import HTTPStatus
from typing import Any, cast

from serve_app.apis.shared.answer import Counted, Running
from serve_app.apis.shared.errors import error_object, to_json
from serve_app.failures import log_internal_error
from serve_app.request_frames import (
    CANCEL,
    COMMAND,
    END,
    HOLD,
    LENGTH,
    SECRET_BYTES,
    START,
    Item,
    ReplicaAddress,
    end_if_dead,
)

logger = logging.getLogger("qwen3_dist.replica")
SECRET_TIMEOUT_S = 10.0  # a connection that has not sent the secret by then is closed
_MAX_OUTBOX_BYTES = 2**18  # made in one turn of the event loop


class RequestServer:
    """Answers the requests of ingresses with `answer`, which gives the items of an answer; its second argument is the
    request's id. Its argument `tell` sends an item at once, also while the answer is held; `num_bytes` is the length
    of all arguments as they came.

    It listens on a free port of `host` from `start` on. What is answered for an ingress ends with its connection.
    """

    def __init__(self, host: str, answer: Callable[..., AsyncGenerator[Any, None]]) -> None:
        self._host = host
        self.answer = answer
        self._secret = secrets.token_bytes(SECRET_BYTES)
        self._listening: asyncio.Task[asyncio.Server] | None = None

    async def start(self) -> ReplicaAddress:
        """Listens, if it does not yet. Raises OSError if it cannot."""
        if self._listening is None:
            create = asyncio.get_running_loop().create_server(lambda: _Connection(self), self._host, 0)
            self._listening = asyncio.ensure_future(create)
        server = await asyncio.shield(self._listening)
        host, port = server.sockets[0].getsockname()[:2]
        return ReplicaAddress(host, port, self._secret)

    def knows(self, secret: bytes) -> bool:
        """Whether `secret` is this server's."""
        return hmac.compare_digest(secret, self._secret)


class _Connection(asyncio.Protocol):
    """The connection of one ingress."""

    def __init__(self, server: RequestServer) -> None:
        self._server = server
        self._received = bytearray()
        self._is_known = False
        self._outbox: list[tuple[int, tuple[Any, ...]]] = []
        self._outbox_bytes = 0
        self._is_paused = False
        self.has_first_tokens = False  # in the outbox
        self._answers: dict[int, _Answer] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it
        end_if_dead(self._transport)
        self._timer = asyncio.get_running_loop().call_later(SECRET_TIMEOUT_S, self._transport.abort)

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        if not self._is_known:
            if len(received) < SECRET_BYTES:
                return
            if not self._server.knows(bytes(received[:SECRET_BYTES])):
                self._transport.abort()
                return
            self._is_known = True
            self._timer.cancel()
            del received[:SECRET_BYTES]
        while len(received) >= COMMAND.size:
            command, number, length = COMMAND.unpack_from(received)
            end = COMMAND.size + length
            if len(received) < end:
                return
            payload = bytes(received[COMMAND.size : end])
            del received[:end]
            self._obey(command, number, payload)

    def _obey(self, command: int, number: int, payload: bytes) -> None:
        if command == START:
            self._answers[number] = _Answer(self, number, self._server.answer, payload)
        elif answer := self._answers.get(number):  # else it has ended
            if command == CANCEL:
                answer.task.cancel()
            else:
                answer.hold(command == HOLD)

    @property
    def is_writable(self) -> bool:
        """Whether the ingress keeps up with what is sent."""
        return not self._is_paused and self._outbox_bytes < _MAX_OUTBOX_BYTES

    def put(self, number: int, item: Any) -> None:
        """Sends an item, Running at once, others together with all others of this turn of the event loop."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        if isinstance(item, Counted):
            self._outbox.append((number, tuple(item)))
            self._outbox_bytes += len(item.item)
            if self._outbox_bytes >= _MAX_OUTBOX_BYTES:
                self._update_answers()
        else:
            self._outbox.append((number, item if isinstance(item, Item) else Item(item)))
            if isinstance(item, Running):  # whatever follows in this turn may be what kills this process
                self._flush()

    def end(self, number: int) -> None:
        """Tells the ingress that an answer has no more items."""
        del self._answers[number]
        self.put(number, END)

    def _flush(self) -> None:
        if not self._outbox:
            return
        frame = pickle.dumps(self._outbox, pickle.HIGHEST_PROTOCOL)
        was_full = not self.is_writable
        self._outbox, self._outbox_bytes = [], 0
        if not self._transport.is_closing():  # uvloop raises RuntimeError then
            self._transport.write(LENGTH.pack(len(frame)) + frame)  # may call pause_writing
        if self.has_first_tokens:
            self.has_first_tokens = False
            os.sched_yield()  # an ingress on this core sends them before this process makes other streams' parts
        if was_full:
            self._update_answers()

    def pause_writing(self) -> None:
        self._is_paused = True
        self._update_answers()

    def resume_writing(self) -> None:
        self._is_paused = False
        self._update_answers()

    def connection_lost(self, error: Exception | None) -> None:
        self._timer.cancel()
        for answer in self._answers.values():
            answer.task.cancel()

    def _update_answers(self) -> None:
        for answer in self._answers.values():
            answer.update()


class _Answer:
    """The answer to one request, which a task of its own gives."""

    def __init__(
        self,
        connection: _Connection,
        number: int,
        answer: Callable[..., AsyncGenerator[Any, None]],
        payload: bytes,
    ) -> None:
        self._connection, self._number, self._answer = connection, number, answer
        self._is_held = False
        self._may_send = connection.is_writable
        self._changed = asyncio.Event()
        self._has_tokens = False
        self.task = asyncio.get_running_loop().create_task(self._give(payload))

    def hold(self, is_held: bool) -> None:
        """Sends nothing while `is_held`."""
        self._is_held = is_held
        self.update()

    def update(self) -> None:
        """Decides again whether items may be sent."""
        self._may_send = self._connection.is_writable and not self._is_held
        if self._may_send:
            self._changed.set()

    def _tell(self, item: Any) -> None:
        self._connection.put(self._number, item)

    async def _give(self, payload: bytes) -> None:
        connection, number, request_id = self._connection, self._number, ""
        try:
            arguments, options = pickle.loads(payload)
            _, request_id, *_ = arguments
            options |= {"tell": self._tell, "num_bytes": len(payload)}
            async with aclosing(self._answer(*arguments, **options)) as items:
                async for item in items:
                    while not self._may_send:
                        self._changed.clear()
                        await self._changed.wait()
                    connection.put(number, item)
                    if not self._has_tokens and isinstance(item, Counted) and item.sent:
                        self._has_tokens = connection.has_first_tokens = True
        except Exception as error:  # noqa: BLE001 - such as a request that this version does not know
            known = log_internal_error(error, logger, request_id)
            connection.put(number, (HTTPStatus.INTERNAL_SERVER_ERROR, to_json(error_object(known))))
        finally:
            connection.end(number)
