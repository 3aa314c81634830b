"""The Ray resources of one replica: a bundle for its engine and one for each tp group of its ranks.

The replica actor takes bundle 0. Ranks that run inside the replica (executor in_process or processes) share it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray

from cluster.ray_private import free_resources
from qwen3_dist.errors import ResourceError
from qwen3_dist.launch.ray_ranks import (
    check_cpus,
    choose_device,
    cluster_resources,
    rank_bundles,
    ranks_per_host,
)
from qwen3_dist.settings import EngineConfig
from serve_app.settings import ModelSettings

# All engines together reserve at most this share of the CPUs; `rank_bundles` leaves room for it.
_ENGINE_SHARE = 0.1
_RANKS_SHARE = 0.8  # what all ranks together take where they are more than the CPUs, see `rank_bundles`


@dataclass(frozen=True)
class Placement:
    """The engine's settings with device and executor resolved, and the replica's bundles."""

    engine: EngineConfig
    bundles: list[dict[str, float]]

    @property
    def actor_options(self) -> dict[str, float]:
        """Ray options of the replica actor, which takes all of bundle 0."""
        return {"num_cpus": self.bundles[0]["CPU"], "num_gpus": self.bundles[0].get("GPU", 0)}


def place(model: ModelSettings, models: Sequence[ModelSettings] = ()) -> Placement:
    """Decides what a replica of `model` reserves on the connected Ray cluster, beside those of all `models`.

    Without a cluster (`serve build`) this machine stands in for it. CPU ranks may outnumber the cores,
    each then reserving less than one, but a tenth at least unless `cpus_per_rank` says less. Raises ResourceError if
    `min_replicas` replicas, or one, can never fit.
    """
    engine, scaling = model.replica.engine, model.scaling
    world, least = engine.layout.world, max(1, scaling.min_replicas)
    device = choose_device(engine, least)
    if device == "cpu" and engine.cpus_per_rank is None and ray.is_initialized():
        check_cpus(engine.layout, least)
    # CPU ranks of other models share the cores, so each takes the part it would have among as many of this model's.
    as_many = max(1, round(sum(_most_ranks(each) for each in models or [model]) / world))
    ranks = rank_bundles(engine, device, as_many if device == "cpu" else scaling.max_replicas)
    total = cluster_resources().get("CPU", 0.0)
    replicas = max(1, math.floor(total * _RANKS_SHARE / max(_total(ranks, "CPU"), 0.01)))  # that fit at all
    share = math.floor(total * _ENGINE_SHARE / replicas * 100) / 100
    engine_bundle = {"CPU": min(1.0, max(0.01, share))}
    needed = least * (engine_bundle["CPU"] + _total(ranks, "CPU"))
    if needed > total:
        raise ResourceError(
            f"{least} replica(s) of {world} rank(s) at {_total(ranks, 'CPU') / world:g} CPUs each need "
            f"{needed:g} CPUs and the Ray cluster has {total:g}; lower cpus_per_rank, min_replicas or the layout"
        )
    # Even a single rank gets its own process: in the replica, answering requests would hold the GIL and delay steps.
    executor = engine.executor if engine.executor != "auto" else "processes" if world == 1 else "ray"
    if executor == "ray":
        bundles = [engine_bundle, *ranks]
        engine = dataclasses.replace(engine, placement="current")
    else:
        bundles = [{name: round(engine_bundle.get(name, 0) + _total(ranks, name), 2) for name in ranks[0]}]
    if engine.ranks_per_host is None and device == "cpu":
        on_host = ranks_per_host(world * as_many, _total(ranks, "CPU") / world)
        engine = dataclasses.replace(engine, ranks_per_host=on_host)
    if device == "cpu":
        engine = dataclasses.replace(engine, cpus_per_rank=round(_total(ranks, "CPU") / world, 2))
    return Placement(dataclasses.replace(engine, device=device, executor=executor), bundles)


def surge_percent(model: ModelSettings, placement: Placement) -> int:
    """The replicas that a deployment starts before old ones end, in percent of `min_replicas`."""
    if model.scaling.max_surge_percent is not None:
        return model.scaling.max_surge_percent
    if placement.engine.device == "cpu":
        return 0
    replicas = max(1, model.scaling.min_replicas)
    return min(replicas, _room(placement.bundles, free_resources(), replicas)) * 100 // replicas


def _room(bundles: list[dict[str, float]], nodes: list[dict[str, float]], most: int) -> int:
    """How many replicas of these bundles fit on nodes with so much free, at most `most`."""
    for number in range(most):
        for bundle in bundles:
            node = next((free for free in nodes if _holds(free, bundle)), None)
            if node is None:
                return number
            for name, amount in bundle.items():
                node[name] = node.get(name, 0.0) - amount
    return most


def _holds(free: Mapping[str, float], bundle: Mapping[str, float]) -> bool:
    return all(free.get(name, 0.0) >= amount for name, amount in bundle.items() if amount)


def _most_ranks(model: ModelSettings) -> int:
    return model.replica.engine.layout.world * model.scaling.max_replicas


def _total(bundles: list[dict[str, float]], resource: str) -> float:
    return sum(bundle[resource] for bundle in bundles)
