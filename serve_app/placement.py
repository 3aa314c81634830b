"""What one replica reserves in Ray: a bundle for its engine and one for each of its ranks.

The replica actor takes bundle 0. Ranks that run inside it (a world of one) share that bundle.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from cluster.ray_cluster import Capacity
from qwen3_dist.errors import ResourceError
from qwen3_dist.settings import EngineConfig
from serve_app.config import ServiceConfig

# Shares of the cluster's CPUs that all ranks, and all engines beside them, may reserve. What is left
# over is Ray's and the HTTP server's own.
_RANK_SHARE = 0.8
_ENGINE_SHARE = 0.1


@dataclass(frozen=True)
class Placement:
    """The engine settings with device, executor and CPUs decided, and the reservations that follow."""

    engine: EngineConfig
    bundles: list[dict[str, float]]

    @property
    def actor_options(self) -> dict[str, float]:
        """Ray options of the replica actor: all of bundle 0."""
        first = self.bundles[0]
        return {"num_cpus": first.get("CPU", 0), "num_gpus": first.get("GPU", 0)}


def place(config: ServiceConfig, capacity: Capacity) -> Placement:
    """Decides what a replica of `config` reserves on a cluster of `capacity`.

    CPU ranks may outnumber the cores: each then reserves less than one CPU. Raises ResourceError if
    `min_replicas` replicas cannot fit.
    """
    engine = config.engine
    world = engine.layout.world
    device = engine.device if engine.device != "auto" else "cuda" if capacity.gpus else "cpu"
    if device == "cuda" and capacity.gpus < world * config.min_replicas:
        needed = f"layout {engine.layout} on {config.min_replicas} replica(s) needs {world * config.min_replicas} GPUs"
        raise ResourceError(
            f"{needed} and the cluster has {capacity.gpus:g}; use a smaller layout, add GPUs, or set device=cpu"
        )
    fair = min(1.0, capacity.cpus * _RANK_SHARE / (config.max_replicas * world))
    cpus = engine.cpus_per_rank or _floor(fair)
    engine_cpus = _floor(min(1.0, capacity.cpus * _ENGINE_SHARE / config.max_replicas))
    required = config.min_replicas * (world * cpus + engine_cpus)
    if required > capacity.cpus:
        raise ResourceError(
            f"{config.min_replicas} replica(s) of {world} rank(s) at cpus_per_rank={cpus:g} need "
            f"{required:g} CPUs and the cluster has {capacity.cpus:g}; lower cpus_per_rank or the layout"
        )
    rank = {"CPU": cpus, "GPU": 1.0} if device == "cuda" else {"CPU": cpus}
    executor = engine.executor if engine.executor != "auto" else "in_process" if world == 1 else "ray"
    if executor == "ray":
        bundles = [{"CPU": engine_cpus}, *[dict(rank) for _ in range(world)]]
    else:
        bundles = [{"CPU": round(engine_cpus + world * cpus, 2), **({"GPU": float(world)} if device == "cuda" else {})}]
    return Placement(
        dataclasses.replace(engine, device=device, executor=executor, cpus_per_rank=cpus), bundles
    )


def _floor(cpus: float) -> float:
    return max(math.floor(cpus * 100) / 100, 0.01)
