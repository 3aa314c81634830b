"""A service reloads one model at a time, whichever ingress is asked. No Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.serve.schema import DeploymentStatus

from qwen3_dist.errors import RequestError
from serve_app.ingress import reload
from serve_app.ingress.changes import parse_scale
from serve_app.ingress.peers import Told
from serve_app.ingress.reload import Reload, parse_reload

ROUTE = cast(Any, SimpleNamespace(model=SimpleNamespace(name="m"), replicas="handle"))


class Peers:
    """Other ingresses, which lead reloads of `models`."""

    def __init__(self, *models: str) -> None:
        self.models = models
        self.offered: dict[str, Callable[[], Any]] = {}

    def offer(self, name: str, answer: Callable[[], Any]) -> None:
        self.offered[name] = answer

    async def ask(self, name: str, timeout_s: float) -> list[Any]:
        await asyncio.sleep(0)
        return [*(Told("other", model) for model in self.models), TimeoutError()]


@pytest.fixture
def renewed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The replicas that were renewed, in order."""
    found: list[str] = []

    async def renew(replicas: Any, leaving: str) -> None:
        await asyncio.sleep(0)
        found.append(leaving)

    monkeypatch.setattr(reload, "_renew", renew)
    monkeypatch.setattr(reload, "running_replicas", lambda handle: ("a", "b"))
    set_status(monkeypatch, "HEALTHY")
    return found


def set_status(monkeypatch: pytest.MonkeyPatch, status: str, **states: int) -> None:
    """Has Serve say this of all deployments."""
    told = SimpleNamespace(status=DeploymentStatus(status), replica_states=states)
    monkeypatch.setattr(reload, "_status", lambda handle: told)


def test_replicas_leave_in_turn_and_another_reload_is_refused_meanwhile(renewed: list[str]) -> None:
    async def run() -> None:
        peers = Peers("")
        led = Reload(cast(Any, peers))
        begun = await led.begin(ROUTE)
        assert begun == {"object": "cluster.reload", "model": "m", "replicas": ["a", "b"]}
        assert peers.offered["reloading"]() == "m"
        with pytest.raises(RequestError, match="'m' are being reloaded") as told:
            await led.begin(ROUTE)
        assert told.value.status == 409
        assert led._task is not None
        await led._task
        assert renewed == ["a", "b"] and led.model == ""
        await led.begin(ROUTE)

    asyncio.run(run())


def test_a_reload_is_refused_while_another_ingress_leads_one(renewed: list[str]) -> None:
    led = Reload(cast(Any, Peers("", "m")))
    with pytest.raises(RequestError) as told:
        asyncio.run(led.begin(ROUTE))
    assert told.value.status == 409 and led.model == "" and not renewed


def test_a_reload_is_refused_while_a_deployment_renews_the_replicas(
    renewed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def begin() -> None:
        led = Reload(cast(Any, Peers()))
        try:
            await led.begin(ROUTE)
        finally:
            assert bool(led.model) == bool(led._task)

    set_status(monkeypatch, "UPDATING")
    with pytest.raises(RequestError, match="a deployment of 'm' still renews its replicas") as told:
        asyncio.run(begin())
    assert told.value.status == 409 and not renewed
    for status in ("UNHEALTHY", "DEPLOY_FAILED", "UPSCALING"):  # a reload may be what mends it
        set_status(monkeypatch, status)
        asyncio.run(begin())


class Replicas:
    """Ray Serve, which notices late that a replica left, and starts another still later unless it `shrinks`."""

    def __init__(self, shrinks: bool) -> None:
        self.running, self._shrinks = ["a", "b"], shrinks
        self.told: dict[str, list[str]] = {}  # the replicas that ran when each was first told to leave
        self._coming: list[Callable[[], None]] = []
        self._looks = 0

    def look(self, handle: Any) -> tuple[str, ...]:
        self._looks += 1
        if self._looks % 3 == 0 and self._coming:
            self._coming.pop(0)()
        return tuple(self.running)

    async def tell(self, handle: Any, method: str, replica: str, timeout_s: float) -> list[Any]:
        if replica not in self.told:
            self.told[replica] = list(self.running)
            self._coming.append(lambda: self.running.remove(replica))
            if not self._shrinks:
                self._coming.append(lambda: self.running.append(replica.upper()))
        return [method == reload.LEAVE, RuntimeError("lost")]


@pytest.mark.parametrize(("shrinks", "second"), [(False, ["b", "A"]), (True, ["b"])])
def test_the_next_replica_leaves_once_there_are_as_many_as_before_or_as_serve_wants(
    monkeypatch: pytest.MonkeyPatch, shrinks: bool, second: list[str]
) -> None:
    replicas = Replicas(shrinks)
    monkeypatch.setattr(reload, "running_replicas", replicas.look)
    monkeypatch.setattr(reload, "broadcast", replicas.tell)
    set_status(monkeypatch, "HEALTHY", RUNNING=2)  # also before it has begun to replace the lost one
    monkeypatch.setattr(reload, "_POLL_S", 0.0)
    monkeypatch.setattr(reload, "_SETTLED_S", 0.0 if shrinks else 1e9)

    async def run() -> None:
        led = Reload(cast(Any, Peers()))
        await led.begin(ROUTE)
        assert led._task is not None
        await asyncio.wait_for(led._task, 60)

    asyncio.run(run())
    assert replicas.told == {"a": ["a", "b"], "b": second}
    assert replicas.running == ([] if shrinks else ["A", "B"])


@pytest.mark.parametrize(
    ("parse", "body", "reason"),
    [
        (parse_reload, b'{"modle": "m"}', "unknown field 'modle'; known are model"),
        (
            parse_scale,
            b'{"min_replicas": 2, "max_replica": 3}',
            "unknown field 'max_replica'; known are model, min_replicas, max_replicas, layout",
        ),
    ],
)
def test_a_change_with_a_misspelled_field_is_refused(parse: Any, body: bytes, reason: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse(body)
    assert (str(refused.value), refused.value.status) == (reason, 400)
