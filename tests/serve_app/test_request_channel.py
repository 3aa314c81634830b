"""The connection that carries requests to a replica and their answers to an ingress, without Ray."""

from __future__ import annotations

import asyncio
import pickle
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import pytest
import uvloop

from qwen3_dist.errors import EngineDeadError
from serve_app.apis.shared.answer import Counted, Running
from serve_app.ingress.request_client import MAX_UNREAD_BYTES, Call, RequestClient
from serve_app.replica import request_server
from serve_app.replica.request_server import RequestServer
from serve_app.request_frames import ReplicaAddress
from serve_app.telemetry.summary import LastPart, RequestSummary

SUMMARY = RequestSummary("replica", "m", 3, 4)
ACCEPTED = Counted((200, b""), 0)


class Channel:
    """A replica, whose answers are those that a test adds to `answers`, and an ingress."""

    def __init__(self) -> None:
        self.server, self.client = RequestServer("127.0.0.1", self._answer), RequestClient()
        self.answers: dict[str, Callable[[], AsyncIterator[Any]]] = {}
        self.given: dict[str, list[Any]] = {}  # by the name of the answer
        self.ended: set[str] = set()
        self.ends = 0  # calls that were told to be over

    async def _answer(self, name: str, *_: str, tell: Any, **options: Any) -> AsyncGenerator[Any, None]:
        given = self.given.setdefault(name, [])
        try:
            async for item in self.answers[name]():
                given.append(item)
                if isinstance(item, Running) and item.waits:
                    tell(item)
                else:
                    yield item
        finally:
            self.ended.add(name)

    async def call(self, name: str, *items: Any, address: ReplicaAddress | None = None) -> Call:
        """Asks for `items`, or for the answer that was added under this name."""
        if items:
            self.answers[name] = lambda: iterate(items)
        connection = await self.client.connect(address or await self.server.start())
        call = Call()

        def end() -> None:
            self.ends += 1

        call.start(connection, pickle.dumps(((name, "request-7"), {"extra": 1})), end)
        return call

    def served(self, call: Call) -> Any:
        """The replica's side of a call's connection."""
        assert call._connection is not None
        port = call._connection._transport.get_extra_info("sockname")[1]
        return next(each for each in CONNECTIONS if each._transport.get_extra_info("peername")[1] == port)


CONNECTIONS: list[Any] = []  # all of the replica
Test: TypeAlias = Callable[[Channel], Awaitable[Any]]
Run: TypeAlias = Callable[[Test], Any]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a test in each of the event loops that Serve may use."""
    CONNECTIONS.clear()
    made = request_server._Connection.connection_made

    def connection_made(self: Any, transport: Any) -> None:
        CONNECTIONS.append(self)
        made(self, transport)

    monkeypatch.setattr(request_server._Connection, "connection_made", connection_made)

    def run(test: Test) -> Any:
        with asyncio.Runner(loop_factory=request.param) as runner:
            return runner.run(asyncio.wait_for(test(Channel()), 30))

    return run


async def iterate(items: Any) -> AsyncIterator[Any]:
    for item in items:
        await asyncio.sleep(0)
        yield item


async def endless() -> AsyncIterator[Any]:
    while True:
        await asyncio.sleep(0)
        yield Counted(b"x", 1)


def counted(*parts: bytes) -> list[Counted]:
    return [Counted(part, tokens) for tokens, part in enumerate(parts, 1)]


async def collect(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_the_parts_of_many_streams_arrive_whole_and_in_order_over_one_connection(run: Run) -> None:
    sent = [[b"%d-%d " % (stream, part) for part in range(50)] for stream in range(20)]

    async def test(channel: Channel) -> list[list[Counted]]:
        async def one(number: int, parts: list[bytes]) -> list[Counted]:
            return await collect(await channel.call(str(number), *counted(*parts)))

        got = await asyncio.gather(*(one(number, parts) for number, parts in enumerate(sent)))
        assert len(CONNECTIONS) == 1
        return got

    got = run(test)
    assert [b"".join(part.item for part in parts) for parts in got] == [b"".join(parts) for parts in sent]
    assert {parts[-1].tokens for parts in got} == {50}


@pytest.mark.parametrize(
    "items",
    [
        [Running("r"), Counted((200, b"whole"), 7)],
        [Running("r"), Running("r", waits=True), Running("r"), Counted((200, b"whole"), 7)],
        [Running("r"), ACCEPTED, Counted(LastPart.of(b"a", SUMMARY), 1)],
        [(503, b"died")],
        [Running("r"), ACCEPTED, *counted(b"a"), (503, b"died")],
    ],
)
def test_every_kind_of_item_arrives_as_it_was_sent(run: Run, items: list[Any]) -> None:
    async def test(channel: Channel) -> list[Any]:
        return await collect(await channel.call("a", *items))

    got = run(test)
    assert got == items and [type(item) for item in got] == [type(item) for item in items]


def test_parts_that_arrive_while_nobody_reads_come_as_one_with_the_last_summary(run: Run) -> None:
    last = Counted(LastPart.of(b"c", SUMMARY), 9)

    async def test(channel: Channel) -> list[Any]:
        call = await channel.call("a", Running("r"), ACCEPTED, *counted(b"a", b"b"), last)
        await until(lambda: call._has_ended)
        return await collect(call)

    first, accepted, part = run(test)
    assert (first, accepted) == (Running("r"), ACCEPTED)
    assert (bytes(part.item), part.tokens) == (b"abc", 9) and part.item.summary == SUMMARY


def test_a_stream_that_nobody_reads_is_held_and_others_go_on(run: Run) -> None:
    big = counted(*[bytes(MAX_UNREAD_BYTES // 4)] * 4000)

    async def test(channel: Channel) -> tuple[int, int]:
        call = await channel.call("slow", *big)
        assert await collect(await channel.call("x", *counted(b"x"))) == counted(b"x")
        await until(lambda: call._is_held)
        for _ in range(100):  # turns in which more could arrive
            await collect(await channel.call("y", *counted(b"y")))
        held_at = len(channel.given["slow"])
        return held_at, sum(len(part.item) for part in await collect(call))

    held_at, size = run(test)
    assert held_at < 200 and size == 4000 * (MAX_UNREAD_BYTES // 4)


def test_a_lost_connection_is_a_lost_replica_and_the_next_request_connects_again(run: Run) -> None:
    async def test(channel: Channel) -> None:
        channel.answers["a"] = endless
        call = await channel.call("a")
        await anext(call)
        channel.served(call)._transport.abort()
        with pytest.raises(EngineDeadError, match="was lost"):
            await collect(call)
        await until(lambda: "a" in channel.ended)
        assert await collect(await channel.call("x", *counted(b"x"))) == counted(b"x")
        assert len(CONNECTIONS) == 2

    run(test)


def test_nothing_is_told_to_who_does_not_know_the_secret(run: Run) -> None:
    async def test(channel: Channel) -> None:
        address = await channel.server.start()
        call = await channel.call("a", *counted(b"a"), address=address._replace(secret=bytes(16)))
        with pytest.raises(EngineDeadError):
            await collect(call)
        assert not channel.given

    run(test)


def test_a_replica_that_is_not_reached_is_lost(run: Run) -> None:
    async def test(channel: Channel) -> None:
        address = await channel.server.start()
        assert channel.server._listening is not None
        channel.server._listening.result().close()
        with pytest.raises(EngineDeadError):
            await channel.call("a", address=address)

    run(test)


def test_the_answers_of_an_ingress_that_is_gone_end(run: Run) -> None:
    async def test(channel: Channel) -> None:
        channel.answers["a"] = endless
        call = await channel.call("a")
        await anext(call)
        assert call._connection is not None
        call._connection._transport.abort()
        await until(lambda: "a" in channel.ended)

    run(test)


def test_a_request_over_a_connection_that_was_just_lost_is_lost(run: Run) -> None:
    async def test(channel: Channel) -> None:
        connection = await channel.client.connect(await channel.server.start())
        connection.connection_lost(None)
        call = Call()
        call.start(connection, b"", lambda: None)
        with pytest.raises(EngineDeadError, match="was lost"):
            await anext(call)

    run(test)


def test_a_cancelled_request_ends_in_the_replica_once_and_leaves_nothing(run: Run) -> None:
    async def test(channel: Channel) -> None:
        channel.answers["a"] = endless
        call = await channel.call("a")
        await anext(call)
        connection = call._connection
        assert connection is not None
        call.cancel()
        call.cancel()
        await until(lambda: "a" in channel.ended)
        assert not connection.calls and channel.ends == 1

    run(test)


def test_who_waits_for_a_cancelled_request_is_told_that_it_is_lost(run: Run) -> None:
    async def test(channel: Channel) -> None:
        waits = asyncio.Event()

        async def hang() -> AsyncIterator[Any]:
            waits.set()
            await asyncio.Event().wait()
            yield

        channel.answers["a"] = hang
        call = await channel.call("a")
        reading = asyncio.ensure_future(anext(call))
        await waits.wait()
        call.cancel()
        with pytest.raises(EngineDeadError):
            await reading

    run(test)


@pytest.mark.parametrize("name", ["bug", "unknown"])
def test_a_bug_is_answered_with_500_and_logged(run: Run, name: str, caplog: pytest.LogCaptureFixture) -> None:
    async def bug() -> AsyncIterator[Any]:
        yield Running("r")
        raise TypeError("secret")

    async def test(channel: Channel) -> Any:
        channel.answers["bug"] = bug
        return (await collect(await channel.call(name)))[-1]

    status, body = run(test)
    assert status == 500 and b"the service failed" in body and b"secret" not in body
    assert b"request-7" in body and any(record.exc_info for record in caplog.records)


def test_a_request_that_cannot_be_read_is_answered_with_500(run: Run) -> None:
    async def test(channel: Channel) -> Any:
        connection = await channel.client.connect(await channel.server.start())
        call = Call()
        call.start(connection, b"no pickle", lambda: None)
        return await collect(call)

    [(status, _)] = run(test)
    assert status == 500


def test_the_system_ends_connections_to_machines_that_are_gone(run: Run) -> None:
    async def test(channel: Channel) -> list[int]:
        call = await channel.call("a", *counted(b"a"))
        await anext(call)
        return [
            end._transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            for end in (call._connection, channel.served(call))
        ]

    assert run(test) == [1, 1]


def test_who_sends_no_secret_is_not_kept(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(channel: Channel) -> bytes:
        address = await channel.server.start()
        assert await collect(await channel.call("x", *counted(b"x"))) == counted(b"x")
        monkeypatch.setattr(request_server, "SECRET_TIMEOUT_S", 0.0)
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(bytes(3))
        try:
            return await reader.read()
        except ConnectionResetError:
            return b""
        finally:
            writer.close()

    assert run(test) == b""


def test_what_arrived_is_read_after_the_connection_was_lost_also_of_a_held_stream(run: Run) -> None:
    big = Counted(bytes(2 * MAX_UNREAD_BYTES), 1)

    async def test(channel: Channel) -> None:
        async def then_hang() -> AsyncIterator[Any]:
            yield big
            await asyncio.Event().wait()

        channel.answers["a"] = then_hang
        call = await channel.call("a")
        await until(lambda: call._is_held)
        assert call._connection is not None
        call._connection._transport.abort()
        await until(lambda: call._is_lost)
        assert await anext(call) == big
        with pytest.raises(EngineDeadError, match="was lost"):
            await anext(call)

    run(test)
