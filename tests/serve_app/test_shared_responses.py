"""Several ingresses share their stored responses. Calls between them are made in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from qwen3_dist.errors import RequestError
from serve_app.apis.responses.recorder import ResponseRecorder
from serve_app.apis.responses.shared_store import SharedStore
from serve_app.apis.shared.errors import to_json
from serve_app.ingress import shared_responses
from serve_app.ingress.peers import Peers, Told, values
from serve_app.ingress.shared_responses import SharedResponses


class Network:
    """Ingresses by name. `lost` ones do not answer, `hanging` ones not before `release` is set."""

    def __init__(self) -> None:
        self.peers: dict[str, NearPeers] = {}
        self.lost: set[str] = set()
        self.hanging: set[str] = set()
        self.release = asyncio.Event()
        self.calls: list[str] = []


class NearPeers(Peers):
    """Peers of the same process."""

    def __init__(self, network: Network, me: str) -> None:
        super().__init__(lambda: pytest.fail("Serve is not asked"), me)
        self._network = network

    @property
    def is_known(self) -> bool:
        return True

    @property
    def others(self) -> list[str]:
        return [name for name in self._network.peers if name != self.me]

    async def ask(
        self, name: str, *arguments: Any, timeout_s: float, only: str = ""
    ) -> list[Told | BaseException]:
        answers: list[Told | BaseException | None] = []
        for each in list(self._network.peers.values()):
            self._network.calls.append(f"{self.me} asks {each.me}: {name}")
            if each.me in self._network.lost:
                answers.append(ConnectionError())
                continue
            if each.me in self._network.hanging:
                await self._network.release.wait()
            answers.append(each.answer(self.me, only, name, arguments))
        return [each for each in answers if each is not None]


class Ingress:
    def __init__(self, network: Network, me: str, max_bytes: int = 2**20) -> None:
        peers = NearPeers(network, me)
        self.store = SharedStore(max_bytes, 100)
        self.shared = SharedResponses(self.store, peers)
        network.peers[me] = peers

    def has(self, name: str) -> bool:
        return self.store.has(f"resp_{name}")

    async def answers(self, name: str, previous: str | None = None) -> None:
        """Adds a response as a request does whose body and answer are read by the recorder."""
        recorder = ResponseRecorder(self.store, self.shared.hand_over)
        link = f', "previous_response_id": "resp_{previous}"' if previous else ""
        recorder.parse(f'{{"model": "m", "input": "{name}"{link}}}'.encode())

        async def items() -> Any:
            yield 200, to_json({"id": f"resp_{name}", "output": []})

        [_ async for _ in recorder.record(items())]

    def asked(self, name: str) -> list[str]:
        """What the user said up to a response."""
        return [item["content"] for item in self.store.conversation(f"resp_{name}")]


def run(what: Callable[[Network], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        await what(Network())

    asyncio.run(main())


def test_the_others_have_a_response_when_the_client_gets_the_end_of_it() -> None:
    async def scenario(network: Network) -> None:
        one, two, three = (Ingress(network, name) for name in ("1", "2", "3"))
        await one.answers("a")
        await two.answers("b", previous="a")
        assert all(each.has("a") and each.has("b") for each in (one, two, three))
        assert three.asked("b") == ["a", "b"]

    run(scenario)


def test_a_single_ingress_asks_nobody() -> None:
    async def scenario(network: Network) -> None:
        one = Ingress(network, "1")
        await one.answers("a")
        assert one.has("a") and not network.calls

    run(scenario)


def test_an_ingress_that_lacks_the_conversation_gets_all_of_it() -> None:
    async def scenario(network: Network) -> None:
        one = Ingress(network, "1")
        await one.answers("a")
        two = Ingress(network, "2")
        await one.answers("b", previous="a")
        assert two.asked("b") == ["a", "b"] and not two.has("a")
        assert await two.shared.response("resp_a") and two.has("a")

    run(scenario)


def test_a_response_is_found_wherever_it_is_and_deleted_everywhere() -> None:
    async def scenario(network: Network) -> None:
        one, two = Ingress(network, "1"), Ingress(network, "2")
        await one.answers("a")
        three = Ingress(network, "3")
        assert await three.shared.response("resp_a") == one.store.response("resp_a")
        four = Ingress(network, "4")
        await four.shared.delete("resp_a")
        for each in (one, two, three, four):
            with pytest.raises(RequestError, match="'resp_a' not found"):
                await each.shared.response("resp_a")
        with pytest.raises(RequestError, match="'resp_a' not found"):
            await one.shared.delete("resp_a")

    run(scenario)


def test_a_lost_ingress_takes_no_response_with_it_and_hinders_none() -> None:
    async def scenario(network: Network) -> None:
        one, two = Ingress(network, "1"), Ingress(network, "2")
        Ingress(network, "0")
        network.lost.add("0")
        await one.answers("a")
        network.lost.add("1")
        assert two.has("a")
        new = Ingress(network, "3")
        assert await new.shared.response("resp_a")
        await new.shared.delete("resp_a")
        assert not two.has("a")

    run(scenario)


def test_an_ingress_that_hangs_holds_no_answer_up_for_long_and_gets_the_copy_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared_responses, "_HAND_OVER_S", 0.01)

    async def scenario(network: Network) -> None:
        one, two = Ingress(network, "1"), Ingress(network, "2")
        network.hanging.add("2")
        await one.answers("a")
        assert not two.has("a")
        network.release.set()
        while not two.has("a"):
            await asyncio.sleep(0)

    run(scenario)


def test_a_client_that_leaves_does_not_stop_the_copy() -> None:
    async def scenario(network: Network) -> None:
        one, two = Ingress(network, "1"), Ingress(network, "2")
        network.hanging.add("2")
        request = asyncio.create_task(one.answers("a"))
        while not network.calls:
            await asyncio.sleep(0)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        network.release.set()
        while not two.has("a"):
            await asyncio.sleep(0)

    run(scenario)


def test_an_ingress_that_starts_copies_all_so_that_the_others_may_go() -> None:
    async def scenario(network: Network) -> None:
        one = Ingress(network, "1")
        for name in "abc":
            await one.answers(name)
        await one.answers("d", previous="a")
        late = Ingress(network, "late", max_bytes=0)  # has less than others, and is asked too
        two = Ingress(network, "2")
        two.shared.copy_once()
        two.shared.copy_once()
        while not all(map(two.has, "abcd")):
            await asyncio.sleep(0)
        assert two.asked("d") == ["a", "d"]
        assert network.calls.count("2 asks 1: ids") == 1 and not late.has("a")

    run(scenario)


def test_an_ingress_that_stores_nothing_asks_for_nothing() -> None:
    async def scenario(network: Network) -> None:
        Ingress(network, "1")
        off = Ingress(network, "2", max_bytes=0)
        with pytest.raises(RequestError):
            await off.shared.response("resp_a")
        assert not network.calls

    run(scenario)


def test_a_call_is_answered_by_all_but_the_asker_or_by_the_one_that_is_meant() -> None:
    peers = Peers(lambda: pytest.fail("Serve is not asked"), "me")
    peers.offer("double", lambda number: 2 * number)
    assert peers.answer("other", "", "double", (4,)) == ("me", 8)
    assert peers.answer("other", "me", "double", (4,)) == ("me", 8)
    assert peers.answer("other", "third", "double", (4,)) is None
    assert peers.answer("me", "", "double", (4,)) is None
    assert values([Told("a", 1), TimeoutError(), Told("b", None)]) == [1, None]
