"""The end of a service: what its ingress does with requests, and what the command does with the ingress."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.apis.shared.errors import error_status
from serve_app.ingress.draining import Draining, DrainingError
from serve_app.ingress.http import error_headers
from serve_app.launch import shutdown


async def counting(
    upto: int, closed: list[bool], gate: asyncio.Event | None = None
) -> AsyncGenerator[int, None]:
    """Numbers below `upto`, then a wait for `gate`."""
    try:
        for number in range(upto):
            yield number
        if gate is not None:
            await gate.wait()
    finally:
        closed.append(True)


def test_a_request_that_ends_in_time_is_passed_on_whole() -> None:
    async def check() -> None:
        draining, closed = Draining(), list[bool]()
        items = draining.watch(counting(3, closed))
        assert await anext(items) == 0
        draining.begin(60.0)
        assert [item async for item in items] == [1, 2]
        assert closed == [True]

    asyncio.run(check())


def test_new_requests_are_refused_with_503_once_the_service_drains() -> None:
    async def check() -> None:
        draining = Draining()
        draining.check()
        draining.begin(60.0)
        with pytest.raises(DrainingError, match="shutting down") as refused:
            draining.check()
        assert error_status(refused.value) == 503 and error_headers(refused.value) == {"retry-after": "5"}

    asyncio.run(check())


@pytest.mark.parametrize("first_s", [60.0, 0.0])
def test_a_request_that_waits_when_its_time_is_up_ends_with_an_error(first_s: float) -> None:
    async def check() -> None:
        draining, closed = Draining(), list[bool]()
        items = draining.watch(counting(1, closed, asyncio.Event()))
        assert await anext(items) == 0
        waiting = asyncio.create_task(anext(items))
        await asyncio.sleep(0)
        draining.begin(first_s)
        draining.begin(0.0)  # as a second signal does
        with pytest.raises(DrainingError, match="did not end in time"):
            await waiting
        assert closed == [True]

    asyncio.run(check())


def test_a_request_whose_client_leaves_while_the_service_drains_is_closed() -> None:
    async def check() -> None:
        draining, closed = Draining(), list[bool]()
        items = draining.watch(counting(2, closed))
        await anext(items)
        draining.begin(60.0)
        await items.aclose()
        assert closed == [True]

    asyncio.run(check())


class FakeIngress:
    """A handle of ingresses that have so many requests left at each call, or fail."""

    def __init__(self, *running: list[Any] | Exception) -> None:
        self.running = list(running)
        self.given_s: list[float] = []

    def broadcast(self, method: str, timeout_s: float) -> SimpleNamespace:
        assert method == "drain"
        self.given_s.append(timeout_s)
        return SimpleNamespace(results=self.results)

    def results(self, timeout_s: float, return_exceptions: bool) -> list[Any]:
        assert return_exceptions
        running = self.running.pop(0) if len(self.running) > 1 else self.running[0]
        if isinstance(running, Exception):
            raise running
        return running


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes by sleeping alone."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(shutdown, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))


def test_an_ingress_that_hangs_or_is_lost_does_not_end_the_requests_of_the_others() -> None:
    ingress = FakeIngress(*[[TimeoutError(), 2]] * 40, [ConnectionError(), 1], [0])
    shutdown.drain(ingress, 600.0, lambda line: None, lambda: False)  # type: ignore[arg-type]
    assert len(ingress.given_s) == 42


def test_the_end_waits_for_running_requests_and_says_so_once() -> None:
    ingress, lines = FakeIngress([2, 1], [1, 0], [0, 0]), list[str]()
    shutdown.drain(ingress, 600.0, lines.append, lambda: False)  # type: ignore[arg-type]
    assert len(ingress.given_s) == 3
    assert len(lines) == 1 and lines[0].startswith("refusing new requests; 3 running sequence(s) have 600 s")


def test_the_end_comes_after_the_whole_time_that_the_setting_promises() -> None:
    ingress = FakeIngress([1])
    shutdown.drain(ingress, 600.0, lambda _: None, lambda: False)  # type: ignore[arg-type]
    assert ingress.given_s[0] == 600.0 and ingress.given_s[-1] == 0.0
    assert 600 <= len(ingress.given_s) * shutdown._POLL_S <= 604


def test_a_second_signal_ends_the_wait_at_once() -> None:
    ingress = FakeIngress([1])
    shutdown.drain(ingress, 600.0, lambda _: None, lambda: len(ingress.given_s) > 2)  # type: ignore[arg-type]
    assert ingress.given_s[3:] and set(ingress.given_s[3:]) == {0.0}
    assert len(ingress.given_s) * shutdown._POLL_S < 5


@pytest.mark.parametrize("silence", [[], RuntimeError("no replica")])
def test_an_ingress_that_is_gone_is_waited_for_only_shortly(silence: list[int] | Exception) -> None:
    ingress = FakeIngress(silence)
    shutdown.drain(ingress, 600.0, lambda _: None, lambda: False)  # type: ignore[arg-type]
    assert len(ingress.given_s) * shutdown._POLL_S < 6
