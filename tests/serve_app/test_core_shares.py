"""How deployed models whose CPU ranks share the cores keep or change their shares, without Ray."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from qwen3_dist.errors import ResourceError
from serve_app.launch.deploy import _shares_of_cores
from serve_app.launch.schema import serve_schema
from serve_app.placement import place
from serve_app.settings import read_service_config

ONE = {"model": "bundled", "layout": "tp=2", "device": "cpu"}
OTHER = {"model": "bundled", "model_name": "other", "layout": "tp=2", "device": "cpu"}


def args_of_first(models: list[dict[str, Any]], deployed: dict[str, Any]) -> dict[str, Any]:
    """The arguments with which the first of `models` is deployed, where `deployed` were those before."""
    config = read_service_config({"models": models})
    args = serve_schema(config)["applications"][1]["args"]
    [model, *_] = config.models
    engine = place(model, config.models).engine
    return {**args, **_shares_of_cores(model, engine, args, deployed)}


def test_a_model_that_stays_keeps_its_share_when_another_comes() -> None:
    alone = args_of_first([ONE], {})
    assert args_of_first([ONE, OTHER], alone) == alone
    assert args_of_first([ONE, OTHER], {})["cpus_per_rank"] < alone["cpus_per_rank"]


def test_a_model_that_is_loaded_again_anyway_makes_room_for_another() -> None:
    alone = args_of_first([ONE], {})
    changed = {**ONE, "max_model_len": 512}
    assert args_of_first([changed, OTHER], alone) == args_of_first([changed, OTHER], {})


def test_a_share_that_is_set_is_not_touched() -> None:
    fixed = {**ONE, "cpus_per_rank": 0.25}
    alone = args_of_first([fixed], {})
    assert alone["cpus_per_rank"] == 0.25
    assert args_of_first([fixed, OTHER], alone) == alone


def test_more_ranks_than_ten_a_cpu_are_refused_but_with_a_share_that_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    many = {"model": "bundled", "layout": "tp=4,dp=4", "device": "cpu", "min_replicas": 2, "max_replicas": 2}
    [model] = read_service_config(many).models
    with pytest.raises(
        ResourceError, match=r"2 replica.* of 16 CPU rank.* 2 CPUs; 20 ranks each have a tenth"
    ):
        place(model)
    monkeypatch.undo()
    [model] = read_service_config({**many, "cpus_per_rank": 0.01}).models
    assert place(model).engine.cpus_per_rank == 0.01
