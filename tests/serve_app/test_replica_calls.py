"""How an ingress sends requests to the replicas that Serve runs, and what it tells Serve. No Ray."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextvars import Context, ContextVar, copy_context
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import ActorDiedError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from qwen3_dist.errors import EngineDeadError
from serve_app.apis.chat.request import parse_chat
from serve_app.apis.embeddings import parse_embedding
from serve_app.apis.shared.answer import Running
from serve_app.ingress import replica_calls
from serve_app.ingress.replica_calls import ReplicaCalls
from serve_app.ingress.replica_table import ReplicaTable
from serve_app.ingress.request_client import Call
from serve_app.replica.request_server import RequestServer
from serve_app.replica_status import ReplicaStatus

EMBED = parse_embedding(b'{"input": "x"}')


class Replicas:
    """Replicas that Serve runs, each of which says that it has a request, and then hangs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.servers = {name: RequestServer("127.0.0.1", self._answers(name)) for name in "abc"}
        self.running: tuple[str, ...] = ("a", "b", "c")
        self.asked = self.polls = 0  # Serve for a replica; replicas for their status
        self.counted: Counter[str] = Counter()  # requests in flight, as Serve is told
        self.started = asyncio.Event()  # the replica that Serve is asked for
        self.requests: list[tuple[Any, ...]] = []
        self.contexts: list[Context] = []  # in which Serve was asked
        self.error: Exception | None = None  # of Serve when it is asked
        self.table = ReplicaTable()
        status = SimpleNamespace(remote=self._status)
        self.calls = ReplicaCalls(cast(Any, SimpleNamespace(status=status)), self.table)
        self.calls.poll = self._poll
        monkeypatch.setattr(replica_calls, "running_replicas", lambda handle: self.running)
        monkeypatch.setattr(replica_calls, "count_request", self._count)

    def _answers(self, name: str) -> Callable[..., AsyncGenerator[Any, None]]:
        async def answer(
            *arguments: Any, tell: Any, num_bytes: int, **options: Any
        ) -> AsyncGenerator[Any, None]:
            self.requests.append((*arguments, options))
            yield Running(name)
            await asyncio.Event().wait()

        return answer

    def _poll(self) -> None:
        self.polls += 1

    def _count(self, handle: Any, replica: str) -> Callable[[], None]:
        self.counted[replica] += 1

        def end() -> None:
            self.counted[replica] -= 1

        return end

    async def _status(self) -> ReplicaStatus:
        self.asked += 1
        self.contexts.append(copy_context())
        await self.started.wait()
        if self.error:
            raise self.error
        return await self.status("b")

    async def status(self, name: str, queued_tokens: int = 0) -> ReplicaStatus:
        address = await self.servers[name].start()
        return ReplicaStatus("", queued_tokens, replica=name, address=address)

    async def poll(self, **queued: int) -> None:
        """The ingress hears of these replicas."""
        self.table.update([await self.status(name, tokens) for name, tokens in queued.items()], [])

    async def replica_of(self, call: Call) -> str:
        first: Running = await anext(call)
        return first.replica


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Replicas], Awaitable[Any]]], Any]:
    async def main(test: Callable[[Replicas], Awaitable[Any]]) -> Any:
        return await asyncio.wait_for(test(Replicas(monkeypatch)), 30)

    return lambda test: asyncio.run(main(test))


def test_a_request_goes_to_the_best_replica_past_serve_and_serve_counts_it(run: Any) -> None:
    async def test(replicas: Replicas) -> None:
        await replicas.poll(a=900, b=0, c=500)
        call = replicas.calls.send(EMBED, "id", {"trace": "1"}, resume=None)
        assert await replicas.replica_of(call) == "b" and replicas.counted == {"b": 1}
        assert replicas.requests == [(EMBED, "id", {"trace": "1"}, {"resume": None})]
        again = replicas.calls.send(EMBED, "id")
        assert again._connection is not None  # at once, since there is a connection
        call.cancel()
        call.cancel()
        again.cancel()
        assert not any(replicas.counted.values()) and replicas.asked == 0

    run(test)


def test_a_prompt_goes_where_its_beginning_was_computed(run: Any) -> None:
    async def test(replicas: Replicas) -> None:
        await replicas.poll(a=0, b=0, c=0)
        prompt = parse_chat(json.dumps({"messages": [{"role": "user", "content": "x" * 9000}]}).encode())
        first = await replicas.replica_of(replicas.calls.send(prompt, "id"))
        await replicas.poll(a=0, b=0, c=0)
        assert [await replicas.replica_of(replicas.calls.send(prompt, "id")) for _ in range(3)] == [first] * 3

    run(test)


def test_a_replica_that_serve_stops_takes_no_request(run: Any) -> None:
    async def test(replicas: Replicas) -> None:
        await replicas.poll(a=0, b=900, c=900)
        replicas.running = ("b", "c")
        assert {await replicas.replica_of(replicas.calls.send(EMBED, "id")) for _ in range(8)} == {"b", "c"}

    run(test)


@pytest.mark.parametrize("running", [(), ("b",)])
def test_serve_is_asked_for_a_replica_while_none_is_known(run: Any, running: tuple[str, ...]) -> None:
    async def test(replicas: Replicas) -> None:
        replicas.running = running
        waiting = [asyncio.ensure_future(anext(replicas.calls.send(EMBED, "id"))) for _ in range(3)]
        await asyncio.sleep(0.01)
        assert replicas.asked == 3 and not replicas.requests  # each counts as waiting
        replicas.running = ("b",)
        replicas.started.set()
        assert await asyncio.gather(*waiting) == [Running("b")] * 3
        assert await replicas.replica_of(replicas.calls.send(EMBED, "id")) == "b" and replicas.asked == 3

    run(test)


def test_new_replicas_are_asked_for_their_address_once(run: Any) -> None:
    async def test(replicas: Replicas) -> None:
        await replicas.poll(a=0)
        for _ in range(3):
            assert await replicas.replica_of(replicas.calls.send(EMBED, "id")) == "a"
        assert replicas.polls == 1
        await replicas.poll(a=900, b=0)
        assert await replicas.replica_of(replicas.calls.send(EMBED, "id")) == "b" and replicas.polls == 1
        await replicas.poll(b=0, c=0)
        replicas.calls.send(EMBED, "id")
        assert replicas.polls == 2

    run(test)


def test_a_replica_that_is_not_reached_takes_nothing_until_a_poll_finds_it(run: Any) -> None:
    async def test(replicas: Replicas) -> None:
        await replicas.poll(a=0, b=900)
        listening = replicas.servers["a"]._listening
        assert listening is not None
        listening.result().close()
        with pytest.raises(EngineDeadError):
            await anext(replicas.calls.send(EMBED, "id"))
        assert not replicas.counted
        assert await replicas.replica_of(replicas.calls.send(EMBED, "id")) == "b"

    run(test)


def test_a_request_that_is_cancelled_before_a_replica_is_found_is_sent_to_none(run: Any) -> None:
    async def test(replicas: Replicas) -> None:
        replicas.running = ()
        call = replicas.calls.send(EMBED, "id")
        reading = asyncio.ensure_future(anext(call))
        await asyncio.sleep(0.01)
        call.cancel()
        replicas.started.set()
        with pytest.raises(EngineDeadError):
            await reading
        await asyncio.sleep(0.01)
        assert not replicas.requests and not replicas.counted

    run(test)


def test_a_client_that_leaves_while_serve_starts_a_replica_has_lost_none(run: Any) -> None:
    client: ContextVar[asyncio.Task[Any] | None] = ContextVar("client", default=None)

    async def test(replicas: Replicas) -> None:
        replicas.running = ()
        call = replicas.calls.send(EMBED, "id")
        reading = asyncio.ensure_future(anext(call))
        await asyncio.sleep(0.01)
        reading.cancel()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        client.set(asyncio.current_task())
        replicas.calls.send(EMBED, "id")
        await asyncio.sleep(0.01)
        assert (
            replicas.asked == 2 and replicas.contexts[-1].get(client) is None
        )  # Serve cancels nothing of it

    run(test)


@pytest.mark.parametrize("error", [ActorDiedError(), DeploymentUnavailableError(DeploymentID("replica"))])
def test_a_replica_that_is_lost_while_serve_is_asked_for_it_is_a_loss(run: Any, error: Exception) -> None:
    async def test(replicas: Replicas) -> None:
        replicas.running, replicas.error = (), error
        replicas.started.set()
        with pytest.raises(EngineDeadError, match="the replica that was to run this request is gone"):
            await anext(replicas.calls.send(EMBED, "id"))

    run(test)
