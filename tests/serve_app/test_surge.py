"""How many replicas of a changed model start before old ones end, without Ray."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from serve_app import placement
from serve_app.launch.deploy import _set_surge
from serve_app.placement import Placement, surge_percent
from serve_app.settings import read_service_config

ENGINE = {"CPU": 0.1}
TP2 = [ENGINE, {"CPU": 2.0, "GPU": 2.0}]


def percent(
    monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]], device: str = "cuda", **settings: Any
) -> int:
    monkeypatch.setattr(placement, "free_resources", lambda: [dict(node) for node in nodes])
    [model] = read_service_config({"min_replicas": 1, "max_replicas": 4, **settings}).models
    engine = dataclasses.replace(model.replica.engine, device=device)
    return surge_percent(model, Placement(engine, TP2))


def node(gpus: float, cpus: float = 8.0) -> dict[str, float]:
    return {"CPU": cpus, "GPU": gpus, "memory": 1e9}


@pytest.mark.parametrize(
    ("nodes", "replicas", "expected"),
    [
        ([node(2)], 1, 100),
        ([node(1), node(1)], 1, 0),  # the ranks of one tp group share a node
        ([node(2, cpus=2.0)], 1, 0),
        ([node(2), node(1)], 2, 50),
        ([node(2), node(2)], 3, 66),  # of 3 replicas 2, as Serve rounds up
        ([node(8), node(8)], 2, 100),
        ([{"CPU": 64.0}], 1, 0),
    ],
)
def test_as_many_start_first_as_gpus_are_free_for(
    monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]], replicas: int, expected: int
) -> None:
    assert percent(monkeypatch, nodes, min_replicas=replicas) == expected


def test_on_cpus_none_starts_first_unless_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert percent(monkeypatch, [node(8)], device="cpu") == 0
    assert percent(monkeypatch, [node(8)], device="cpu", max_surge_percent=50) == 50
    assert percent(monkeypatch, [node(8)], max_surge_percent=0) == 0


@pytest.mark.parametrize(("args", "expected"), [({"layout": "tp=2"}, 0), ({"layout": "tp=4"}, 100)])
def test_a_model_that_stays_is_not_changed_by_what_is_free(args: dict[str, Any], expected: int) -> None:
    app: dict[str, Any] = {"args": args, "deployments": [{}]}
    before = {"args": {"layout": "tp=2"}, "deployments": [{"max_surge_percent": 0}]}
    _set_surge(app, before, 100)
    assert app["deployments"] == [{"max_surge_percent": expected}]
