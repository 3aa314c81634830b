"""Answers to clients that read slowly or not at all, with Serve's queue of messages and no server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import contextmanager
from typing import Any

import pytest
from ray.serve._private.http_util import MessageQueue
from starlette.requests import ClientDisconnect

from qwen3_dist.errors import EngineDeadError
from serve_app.apis.shared.answer import PING, error_events
from serve_app.ingress.sending import CHUNK_BYTES, MAX_UNSENT_BYTES, EventStream, LargeResponse, track_unsent

PART = b"x" * (MAX_UNSENT_BYTES // 4)


class Connection:
    """What Serve has of a client: a queue of messages, which the client's reading empties."""

    def __init__(self) -> None:
        self.queue = MessageQueue()
        queue = self.queue

        async def enqueue(message: Any) -> None:
            queue.put_nowait(message)

        self.scope: dict[str, Any] = {"type": "http", "asgi": {"spec_version": "2.4"}}
        self.send: Callable[[Any], Awaitable[None]] = enqueue
        track_unsent(self.scope, self.send)

    async def receive(self) -> Any:
        await asyncio.Event().wait()

    @property
    def unsent(self) -> int:
        return sum(len(message.get("body", b"")) for message in self.queue._message_queue)

    def read(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.queue.get_messages_nowait())


class Parts:
    """Parts of an answer, counted as they are asked for."""

    def __init__(self) -> None:
        self.asked = 0
        self.closed = False

    async def items(self, most: int) -> AsyncGenerator[bytes, None]:
        try:
            for _ in range(most):
                self.asked += 1
                yield PART
                await asyncio.sleep(0)
        finally:
            self.closed = True


def test_a_client_that_reads_nothing_is_asked_nothing_more_for_and_its_stream_ends_with_an_error() -> None:
    parts, connection = Parts(), Connection()
    held: list[str] = []

    @contextmanager
    def admitted() -> Any:
        held.append("in")
        yield
        held.append("out")

    stream = EventStream(b"first", parts.items(1000), error_events, 0.05, admitted())
    asyncio.run(stream(connection.scope, connection.receive, connection.send))
    assert parts.asked < 8 and parts.closed
    assert held == ["in", "out"]
    *_, error, done = connection.read().removesuffix(b"\n\n").rsplit(b"\n\n", 1)
    assert b"not read for 0.05 seconds" in error and done == b"data: [DONE]"


def test_a_client_that_reads_slowly_gets_all_and_little_waits_for_it() -> None:
    parts, connection = Parts(), Connection()
    most = 0

    async def read_slowly(answer: asyncio.Task[None]) -> bytes:
        nonlocal most
        got = b""
        while not answer.done():
            await asyncio.sleep(0.001)
            most = max(most, connection.unsent)
            got += connection.read()
        return got + connection.read()

    async def run() -> bytes:
        stream = EventStream(b"first", parts.items(100), error_events, 60.0)
        answer = asyncio.ensure_future(stream(connection.scope, connection.receive, connection.send))
        got = await read_slowly(answer)
        await answer
        return got

    assert asyncio.run(run()) == b"first" + 100 * PART
    assert most <= MAX_UNSENT_BYTES + len(PART)


def test_a_send_that_waits_for_a_client_that_is_gone_ends_and_those_before_do_not_count() -> None:
    parts, connection = Parts(), Connection()
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)
        if message.get("body") == PART and len(sent) > 20:
            await asyncio.Event().wait()
        await asyncio.sleep(0.005)

    async def run() -> None:
        scope = {"type": "http", "asgi": {"spec_version": "2.4"}}
        track_unsent(scope, send)
        stream = EventStream(b"first", parts.items(1000), error_events, 0.05)
        with pytest.raises(ClientDisconnect):
            await asyncio.wait_for(stream(scope, connection.receive, send), 10)

    asyncio.run(run())
    assert len(sent) == 21 and parts.closed


def test_an_error_is_told_with_the_events_that_were_sent_last() -> None:
    connection, told = Connection(), []

    async def items() -> AsyncGenerator[bytes, None]:
        for part in (b"data: 1\n\n", b"data: 2\n\n", PING):
            yield part
        raise EngineDeadError("lost")

    def error_event(error: Exception, sent: bytes) -> bytes:
        told.append((str(error), sent))
        return b"data: error\n\n"

    asyncio.run(EventStream(b"", items(), error_event)(connection.scope, connection.receive, connection.send))
    assert told == [("lost", b"data: 2\n\n")] and connection.read().endswith(PING + b"data: error\n\n")


def test_what_looks_at_answers_sees_the_first_message_and_the_last() -> None:
    parts, connection = Parts(), Connection()
    seen: list[Any] = []

    async def observed(message: Any) -> None:
        seen.append((message["type"], message.get("body"), message.get("more_body")))
        await connection.send(message)

    asyncio.run(
        EventStream(b"first", parts.items(2), error_events)(connection.scope, connection.receive, observed)
    )
    assert [kind for kind, _, _ in seen] == ["http.response.start", "http.response.body"]
    assert seen[-1] == ("http.response.body", b"", False)
    assert connection.read() == b"first" + 2 * PART


@pytest.mark.parametrize("size", [CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_a_large_body_goes_out_in_pieces_that_grpc_takes(size: int) -> None:
    connection = Connection()
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    largest = 0

    async def run() -> bytes:
        nonlocal largest
        answer = asyncio.ensure_future(
            LargeResponse(body, 200, 60.0)(connection.scope, connection.receive, connection.send)
        )
        got = b""
        while not answer.done() or connection.unsent:
            largest = max(largest, connection.unsent)
            got += connection.read()
            await asyncio.sleep(0.001)
        return got

    assert asyncio.run(run()) == body
    assert largest <= CHUNK_BYTES


def test_a_large_body_that_is_not_read_is_given_up() -> None:
    connection = Connection()
    asyncio.run(
        LargeResponse(b"x" * 3 * CHUNK_BYTES, 200, 0.05)(
            connection.scope, connection.receive, connection.send
        )
    )
    assert len(connection.read()) == CHUNK_BYTES
