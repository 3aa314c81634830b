"""The Ray resources of one replica: a bundle for its engine and one for each tp group of its ranks.

The replica actor takes bundle 0. Ranks that run inside the replica (executor in_process or processes) share it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from qwen3_dist.errors import ResourceError
from qwen3_dist.launch.ray_ranks import choose_device, cluster_resources, rank_bundles, ranks_per_host
from qwen3_dist.settings import EngineConfig
from serve_app.settings import ServiceConfig

# All engines together reserve at most this share of the CPUs; `rank_bundles` leaves room for it.
_ENGINE_SHARE = 0.1


@dataclass(frozen=True)
class Placement:
    """The engine's settings with device and executor resolved, and the replica's bundles."""

    engine: EngineConfig
    bundles: list[dict[str, float]]

    @property
    def actor_options(self) -> dict[str, float]:
        """Ray options of the replica actor, which takes all of bundle 0."""
        return {"num_cpus": self.bundles[0]["CPU"], "num_gpus": self.bundles[0].get("GPU", 0)}


def place(config: ServiceConfig) -> Placement:
    """Resolves device and executor, and sizes the bundles of a replica for the connected Ray cluster.

    Without a connection (`serve build`) this machine counts as the cluster. If CPU ranks outnumber the cores, each
    reserves less than one core. Raises ResourceError if `min_replicas` replicas can never fit.
    """
    engine = config.engine
    world = engine.layout.world
    device = choose_device(engine, config.min_replicas)
    ranks = rank_bundles(engine, device, config.max_replicas)
    total = cluster_resources().get("CPU", 0.0)
    share = math.floor(total * _ENGINE_SHARE / config.max_replicas * 100) / 100
    engine_bundle = {"CPU": min(1.0, max(0.01, share))}
    needed = config.min_replicas * (engine_bundle["CPU"] + _total(ranks, "CPU"))
    if needed > total:
        raise ResourceError(
            f"{config.min_replicas} replica(s) of {world} rank(s) at {_total(ranks, 'CPU') / world:g} CPUs each need "
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
        most = ranks_per_host(world * config.max_replicas, _total(ranks, "CPU") / world)
        engine = dataclasses.replace(engine, ranks_per_host=most)
    return Placement(dataclasses.replace(engine, device=device, executor=executor), bundles)


def _total(bundles: list[dict[str, float]], resource: str) -> float:
    return sum(bundle[resource] for bundle in bundles)
