"""What an ingress says of a model by what its replicas tell."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.serve.exceptions import DeploymentUnavailableError

from serve_app.ingress.admission import QueueFullError
from serve_app.ingress.cluster_view import IngressState, cluster_view
from serve_app.ingress.model_routes import ModelRoute
from serve_app.settings import ServedModel


class Alone:
    """An ingress without others."""

    async def ask(self, name: str, timeout_s: float) -> list[Any]:
        return []


MODEL = ServedModel("m", "", (), 1, 2, 4, 1.0, 30.0)


class Replicas:
    """A deployment's handle; `told` is what its replicas answer."""

    app_name = "app"

    def __init__(self, *told: Any) -> None:
        self.told = told

    def broadcast(self, method: str) -> Replicas:
        assert method in ("max_model_len", "describe")
        return self

    def results(self, timeout_s: float, return_exceptions: bool) -> list[Any]:
        assert timeout_s > 0 and return_exceptions
        return list(self.told)


def test_a_model_without_replicas_is_shown_with_where_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = {"app": "{'GPU': 8.0}; there is too little GPU (8 needed, 4 free)"}
    monkeypatch.setattr("serve_app.ingress.cluster_view.unplaced_bundles", lambda app, deployment: rooms[app])
    unused = cast(Any, None)
    lost = DeploymentUnavailableError(cast(Any, "gone"))
    health = cast(Any, SimpleNamespace(num_healthy=0, was_healthy=True))
    route = ModelRoute(MODEL, cast(Any, Replicas(lost)), dispatcher=unused, health=health)
    view = asyncio.run(cluster_view(cast(Any, [route]), IngressState("i", 0, 4, 1.0), cast(Any, Alone())))
    [model] = view["models"]
    assert model["status"] == "unhealthy" and model["replicas_running"] == 0
    assert model["message"].startswith("no replica runs; `qwen3-dist status`")
    assert model["message"].endswith(f"; a replica waits for room for {rooms['app']}")
    assert model["waits_for"] == rooms["app"]


def test_the_longest_sequence_is_what_every_replica_takes_now() -> None:
    replicas = Replicas(TimeoutError())
    unused = cast(Any, None)
    route = ModelRoute(MODEL, cast(Any, replicas), dispatcher=unused, health=unused)

    def longest(*told: Any) -> int | None:
        replicas.told = told
        return asyncio.run(route.longest())

    assert longest() is None
    assert longest(4096) == 4096
    assert longest(4096, 1024) == 1024  # a changed engine replaces another
    assert longest(TimeoutError(), 1024) == 1024
    assert longest(2048) == 2048
    assert longest(TimeoutError()) == longest() == 2048


def test_tokens_that_wait_in_engines_refuse_more_of_them() -> None:
    unused = cast(Any, None)
    health = cast(Any, SimpleNamespace(num_healthy=2, was_healthy=True, queued_tokens=0))
    route = ModelRoute(MODEL, cast(Any, Replicas()), dispatcher=unused, health=health)
    route.max_queued_tokens = 100
    route.queue(body_bytes=4_000)  # alone, so it may be as long as it likes
    with pytest.raises(
        QueueFullError, match="about 1000 tokens of other requests wait already; retry in 1 s"
    ):
        route.queue(body_bytes=40)
    health.queued_tokens = 150  # of two replicas, at the next poll
    route.queue(body_bytes=160)
    with pytest.raises(QueueFullError):
        route.queue(body_bytes=80)
    route.max_queued_tokens = None
    route.queue(body_bytes=4_000_000)
