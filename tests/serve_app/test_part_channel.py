"""The connection that carries the parts of all streams from a replica to an ingress, without Ray."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import pytest
import uvloop

from qwen3_dist.errors import EngineDeadError, RequestError
from serve_app.apis.shared.answer import Counted
from serve_app.ingress.part_client import MAX_UNREAD_BYTES, PartClient
from serve_app.part_frames import PartsAt, PartsSent
from serve_app.replica import part_server
from serve_app.replica.part_server import PartSender, PartServer
from serve_app.telemetry.summary import LastPart, RequestSummary

Run: TypeAlias = Callable[[Callable[[PartServer, PartClient], Awaitable[Any]]], Any]
SUMMARY = RequestSummary("replica", "m", 3, 4)


async def serve(sender: PartSender, parts: list[Counted]) -> PartsSent:
    for part in parts:
        await sender.send(part)
    return PartsSent(sender.num_parts)


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a test in each of the event loops that Serve may use."""

    def run(test: Callable[[PartServer, PartClient], Awaitable[Any]]) -> Any:
        async def main() -> Any:
            server = PartServer("127.0.0.1")
            await server.start()
            return await asyncio.wait_for(test(server, PartClient()), 30)

        with asyncio.Runner(loop_factory=request.param) as runner:
            return runner.run(main())

    return run


@asynccontextmanager
async def stream(
    server: PartServer, client: PartClient, parts: list[Counted]
) -> AsyncIterator[AsyncGenerator[Any, None]]:
    with server.sender() as sender:
        async with client.receive(sender.at) as receiver:
            yield receiver.until(serve(sender, parts))


def counted(*parts: bytes) -> list[Counted]:
    return [Counted(part, tokens) for tokens, part in enumerate(parts, 1)]


async def collect(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


def test_the_parts_of_many_streams_arrive_whole_and_in_order(run: Run) -> None:
    sent = [[b"%d-%d " % (stream, part) for part in range(50)] for stream in range(20)]

    async def test(server: PartServer, client: PartClient) -> list[list[Counted]]:
        async def one(parts: list[bytes]) -> list[Counted]:
            async with stream(server, client, counted(*parts)) as items:
                return await collect(items)

        got = await asyncio.gather(*map(one, sent))
        assert len(client._connections) == 1
        return got

    got = run(test)
    assert [b"".join(part.item for part in parts) for parts in got] == [b"".join(parts) for parts in sent]
    assert {parts[-1].tokens for parts in got} == {50}


def test_what_arrives_while_nobody_reads_comes_as_one_part_with_the_last_summary(run: Run) -> None:
    last = LastPart.of(b"c", SUMMARY)

    async def test(server: PartServer, client: PartClient) -> list[Counted]:
        with server.sender() as sender:
            async with client.receive(sender.at) as receiver:
                end = await serve(sender, [*counted(b"a", b"b"), Counted(last, 9)])
                while receiver._num_parts < 3:
                    await asyncio.sleep(0.001)
                return await collect(receiver.until(asyncio.sleep(0, end)))

    [part] = run(test)
    assert (bytes(part.item), part.tokens) == (b"abc", 9) and part.item.summary == SUMMARY


def test_a_stream_that_nobody_reads_is_held_and_others_go_on(run: Run) -> None:
    big = counted(*[bytes(MAX_UNREAD_BYTES // 4)] * 4000)

    async def test(server: PartServer, client: PartClient) -> tuple[int, int]:
        with server.sender() as slow:
            async with client.receive(slow.at) as receiver:
                sending = asyncio.create_task(serve(slow, big))
                async with stream(server, client, counted(b"x")) as items:
                    assert await collect(items) == counted(b"x")
                while not receiver._is_held:
                    await asyncio.sleep(0.001)
                for _ in range(100):  # turns in which more could arrive
                    async with stream(server, client, counted(b"y")) as items:
                        await collect(items)
                held_at = slow.num_parts
                got = await collect(receiver.until(sending))
                return held_at, sum(len(part.item) for part in got)

    held_at, size = run(test)
    assert held_at < 200 and size == 4000 * (MAX_UNREAD_BYTES // 4)


def test_an_error_after_some_parts_is_the_last_item(run: Run) -> None:
    async def test(server: PartServer, client: PartClient) -> list[Any]:
        with server.sender() as sender:

            async def fail() -> tuple[int, bytes]:
                await sender.send(Counted(b"a", 1))
                return 503, b"dead"

            async with client.receive(sender.at) as receiver:
                return await collect(receiver.until(fail()))

    assert run(test)[-1] == (503, b"dead")


def test_a_lost_connection_is_a_lost_replica_and_the_next_stream_connects_again(run: Run) -> None:
    async def test(server: PartServer, client: PartClient) -> list[Any]:
        with server.sender() as sender:
            async with client.receive(sender.at) as receiver:
                await serve(sender, counted(b"a"))
                assert sender._connection is not None
                sender._connection._transport.abort()
                with pytest.raises(EngineDeadError, match="was lost"):
                    await collect(receiver.until(asyncio.Event().wait()))
        async with stream(server, client, counted(b"x")) as items:
            return await collect(items)

    assert run(test) == counted(b"x")


def test_nothing_is_told_to_who_does_not_know_the_secret(run: Run) -> None:
    async def test(server: PartServer, client: PartClient) -> None:
        with server.sender() as sender:
            wrong = PartsAt(sender.at.host, sender.at.port, bytes(16), sender.at.stream)
            async with client.receive(wrong) as receiver:
                sending = asyncio.create_task(serve(sender, counted(b"a")))
                with pytest.raises(EngineDeadError):
                    await collect(receiver.until(asyncio.Event().wait()))
            assert sender.num_parts == 0
            sending.cancel()

    run(test)


def test_a_replica_that_is_not_reached_is_lost(run: Run) -> None:
    async def test(server: PartServer, client: PartClient) -> None:
        assert server._listening is not None
        with server.sender() as sender:
            server._listening.result().close()
            with pytest.raises(EngineDeadError):
                async with client.receive(sender.at):
                    pass

    run(test)


def test_a_stream_whose_ingress_is_gone_ends(run: Run) -> None:
    async def test(server: PartServer, client: PartClient) -> None:
        with server.sender() as sender:
            async with client.receive(sender.at) as receiver:
                await serve(sender, counted(b"a"))
                receiver._connection._transport.abort()
                with pytest.raises(EngineDeadError, match="the ingress"):
                    while True:
                        await serve(sender, counted(b"b"))
                        await asyncio.sleep(0)

    run(test)


def test_a_stream_ends_for_which_no_ingress_asks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(server: PartServer, client: PartClient) -> None:
        with server.sender() as sender:
            async with client.receive(sender.at) as receiver:
                await serve(sender, counted(b"x"))
                sender.lose_unless_connected()
                assert await collect(receiver.until(serve(sender, []))) == counted(b"x")
        monkeypatch.setattr(part_server, "CONNECT_TIMEOUT_S", 0.0)
        with server.sender() as sender, pytest.raises(EngineDeadError, match="the ingress"):
            await serve(sender, counted(b"a"))

    run(test)


def test_a_connection_that_is_lost_before_the_stream_is_awaited_is_a_lost_replica(run: Run) -> None:
    async def test(server: PartServer, client: PartClient) -> None:
        with server.sender() as sender:
            async with client.receive(sender.at) as receiver:
                lost = receiver._connection
            lost.connection_lost(None)
            client._connections[sender.at.host, sender.at.port] = asyncio.ensure_future(
                asyncio.sleep(0, lost)
            )
            with pytest.raises(EngineDeadError, match="was lost"):
                async with client.receive(sender.at) as receiver:
                    await collect(receiver.until(asyncio.Event().wait()))

    run(test)


def test_a_call_that_returns_nothing_is_a_lost_replica(run: Run) -> None:
    async def test(server: PartServer, client: PartClient) -> None:
        with server.sender() as sender:
            async with client.receive(sender.at) as receiver:
                with pytest.raises(EngineDeadError, match="was lost"):
                    await collect(receiver.until(asyncio.sleep(0)))

    run(test)


def test_a_stream_that_waits_too_long_ends_with_the_given_error_after_what_arrived(run: Run) -> None:
    async def test(server: PartServer, client: PartClient) -> list[Any]:
        with server.sender() as sender:
            async with client.receive(sender.at) as receiver:
                await serve(sender, counted(b"a"))
                while not receiver._num_parts:
                    await asyncio.sleep(0.001)
                now = asyncio.get_running_loop().time()
                items = receiver.until(asyncio.Event().wait(), now, RequestError("too late"))
                await asyncio.sleep(0.001)
                got = [await anext(items)]
                with pytest.raises(RequestError, match="too late"):
                    await anext(items)
                return got

    assert run(test) == counted(b"a")


def test_the_call_of_a_stream_that_nobody_reads_any_more_is_cancelled(run: Run) -> None:
    async def test(server: PartServer, client: PartClient) -> None:
        with server.sender() as sender:
            sending = asyncio.ensure_future(asyncio.Event().wait())
            async with client.receive(sender.at) as receiver:
                receiver.until(sending)
                await asyncio.sleep(0)
            await asyncio.wait([sending])
            assert sending.cancelled() and not client._connections[sender.at[:2]].result().receivers

    run(test)


def test_the_system_ends_connections_to_machines_that_are_gone(run: Run) -> None:
    async def test(server: PartServer, client: PartClient) -> list[int]:
        with server.sender() as sender:
            async with client.receive(sender.at) as receiver:
                await serve(sender, counted(b"a"))
                assert sender._connection is not None
                return [
                    end._transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                    for end in (receiver._connection, sender._connection)
                ]

    assert run(test) == [1, 1]


def test_who_sends_no_secret_is_not_kept(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(server: PartServer, client: PartClient) -> bytes:
        with server.sender() as sender:
            async with stream(server, client, counted(b"x")) as items:
                assert await collect(items) == counted(b"x")
            monkeypatch.setattr(part_server, "SECRET_TIMEOUT_S", 0.0)
            reader, writer = await asyncio.open_connection(sender.at.host, sender.at.port)
            writer.write(bytes(3))
            try:
                return await reader.read()
            except ConnectionResetError:
                return b""
            finally:
                writer.close()

    assert run(test) == b""


def test_what_arrived_is_read_after_the_connection_was_lost_also_of_a_held_stream(run: Run) -> None:
    big = counted(bytes(2 * MAX_UNREAD_BYTES))

    async def test(server: PartServer, client: PartClient) -> None:
        with server.sender() as sender:
            async with client.receive(sender.at) as receiver:
                await serve(sender, big)
                while not receiver._is_held:
                    await asyncio.sleep(0.001)
                receiver._connection._transport.abort()
                while not receiver._is_lost:
                    await asyncio.sleep(0.001)
                items = receiver.until(asyncio.Event().wait())
                assert await anext(items) == big[0]
                with pytest.raises(EngineDeadError, match="was lost"):
                    await anext(items)

    run(test)
