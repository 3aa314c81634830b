"""What one replica reserves in Ray: a bundle for its engine and one for each tp group of its ranks.

The replica actor takes bundle 0. A rank that runs inside it (executor in_process or processes) shares
that bundle.
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
    """The engine's settings with device and executor decided, and the reservations that follow."""

    engine: EngineConfig
    bundles: list[dict[str, float]]

    @property
    def actor_options(self) -> dict[str, float]:
        """Ray options of the replica actor: all of bundle 0."""
        return {"num_cpus": self.bundles[0]["CPU"], "num_gpus": self.bundles[0].get("GPU", 0)}


def place(config: ServiceConfig) -> Placement:
    """Decides what a replica of `config` reserves on the connected Ray cluster.

    Without a cluster (`serve build`) this machine stands in for it. CPU ranks may outnumber the cores,
    each then reserving less than one. Raises ResourceError if `min_replicas` replicas can never fit.
    """
    engine = config.engine
    world = engine.layout.world
    device = choose_device(engine, config.min_replicas)
    ranks = rank_bundles(engine, device, config.max_replicas)
    total = cluster_resources().get("CPU", 0.0)
    share = math.floor(total * _ENGINE_SHARE / config.max_replicas * 100) / 100
    own = {"CPU": min(1.0, max(0.01, share))}
    needed = config.min_replicas * (own["CPU"] + _total(ranks, "CPU"))
    if needed > total:
        raise ResourceError(
            f"{config.min_replicas} replica(s) of {world} rank(s) at {_total(ranks, 'CPU') / world:g} CPUs each need "
            f"{needed:g} CPUs and the Ray cluster has {total:g}; lower cpus_per_rank, min_replicas or the layout"
        )
    # Not even a lone rank runs in the replica's process: answering requests would keep the GIL from its steps.
    executor = engine.executor if engine.executor != "auto" else "processes" if world == 1 else "ray"
    if executor == "ray":
        bundles = [own, *ranks]
        engine = dataclasses.replace(engine, placement="current")
    else:
        bundles = [{name: round(own.get(name, 0) + _total(ranks, name), 2) for name in ranks[0]}]
    if engine.ranks_per_host is None and device == "cpu":
        most = ranks_per_host(world * config.max_replicas, _total(ranks, "CPU") / world)
        engine = dataclasses.replace(engine, ranks_per_host=most)
    return Placement(dataclasses.replace(engine, device=device, executor=executor), bundles)


def _total(bundles: list[dict[str, float]], resource: str) -> float:
    return sum(bundle[resource] for bundle in bundles)
