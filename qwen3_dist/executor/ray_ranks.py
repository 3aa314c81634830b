"""Ranks as Ray actors in the bundles of a placement group. Ray places, watches and ends them; steps travel
over the group's own channels.

    bundles of an engine of its own:   [tp group 0] [tp group 1] ...
    bundles of a Serve replica:        [replica] [tp group 0] [tp group 1] ...

A bundle lies on one node, so the ranks of a tp group do, while ep and pp may cross nodes. Where no node has
room for a tp group, each rank has a bundle of its own.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from qwen3_dist.errors import ResourceError
from qwen3_dist.executor.rank import RankSpec, cores, rank_main
from qwen3_dist.executor.rank_group import Launcher
from qwen3_dist.settings import EngineConfig

_log = logging.getLogger(__name__)
_NOTICE_PERIOD_S = 10.0


def cluster_resources() -> dict[str, float]:
    """What the connected Ray cluster has in all; without one, this machine's cores stand in for it."""
    return ray.cluster_resources() if ray.is_initialized() else {"CPU": float(cores())}


def choose_device(config: EngineConfig, replicas: int = 1) -> str:
    """ "cuda" or "cpu" for `replicas` engines of `config`, by what the connected Ray cluster has.

    Raises ResourceError, saying what is missing, if the cluster can never hold them. Without a
    cluster to ask, `device=auto` is "cpu".
    """
    if not ray.is_initialized():
        return "cuda" if config.device == "cuda" else "cpu"
    needed = config.layout.world * replicas
    gpus = int(cluster_resources().get("GPU", 0))
    if config.device == "cpu" or (config.device == "auto" and gpus == 0):
        return "cpu"
    if gpus < needed:
        what = f"{replicas} replicas of {config.layout}" if replicas > 1 else f"layout {config.layout}"
        raise ResourceError(
            f"{what} needs {needed} GPUs and the Ray cluster has {gpus}; add GPUs, use a smaller layout "
            "or device=cpu"
        )
    return "cuda"


def rank_bundles(config: EngineConfig, device: str, replicas: int = 1) -> list[dict[str, float]]:
    """The placement-group bundles of a replica's ranks, sized so that `replicas` engines fit the cluster.

    A GPU rank takes one GPU. A CPU rank takes one CPU, or an even part of 80 % of the cluster's CPUs
    where there are fewer than that (with one warning), so that any layout can be tried on a laptop.
    """
    layout = config.layout
    ranks = layout.world * replicas
    total, cpus = cluster_resources().get("CPU", 0.0), config.cpus_per_rank
    if cpus is None:
        share = total * 0.8 / ranks
        cpus = 1.0 if share >= 1 else max(0.01, int(share * 100) / 100)
        if cpus < 1 and device == "cpu":
            _log.warning(
                "%d CPU ranks share %g CPUs: this works, and is slower than one core per rank",
                ranks,
                total,
            )
    rank = {"CPU": cpus} if device == "cpu" else {"CPU": cpus, "GPU": 1.0}
    group = {name: round(amount * layout.tp, 2) for name, amount in rank.items()}
    if any(all(node.get(name, 0) >= amount for name, amount in group.items()) for node in _nodes()):
        return [dict(group) for _ in range(layout.world // layout.tp)]
    if layout.tp > 1:
        _log.warning("no node has %s for the %d ranks of a tp group, so it may cross nodes", group, layout.tp)
    return [dict(rank) for _ in range(layout.world)]


def _nodes() -> list[dict[str, float]]:
    """What each node has in all; without a cluster, this machine's cores."""
    if not ray.is_initialized():
        return [cluster_resources()]
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


class RankActor:
    """The actor of one rank; `run` returns when the rank has ended."""

    def run(self, spec: RankSpec) -> None:
        rank_main(spec)


class RayLauncher(Launcher):
    """Places ranks in a group of its own, or in that of the Serve replica it runs in."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self.host = ray.util.get_node_ip_address()
        self._actors: list[Any] = []
        self._runs: list[Any] = []
        self._own_group: PlacementGroup | None = None
        current = ray.util.get_current_placement_group()
        sizes = (config.layout.world, config.layout.world // config.layout.tp)
        if current is not None and current.bundle_count - 1 in sizes:
            self._group, self._first_bundle = current, 1
            self.device = "cuda" if "GPU" in current.bundle_specs[1] else "cpu"
        else:
            self.device = choose_device(config)
            bundles = rank_bundles(config, self.device)
            self._own_group = placement_group(bundles, strategy="PACK")
            self._group, self._first_bundle = self._own_group, 0

    def launch(self, specs: list[RankSpec]) -> None:
        self._wait_for_place()
        bundles = self._bundles_by_node()
        together = len(specs) // len(bundles)
        for spec in specs:
            bundle = bundles[spec.rank // together]
            resources = {name: amount / together for name, amount in self._group.bundle_specs[bundle].items()}
            actor = (
                ray.remote(RankActor)
                .options(
                    max_restarts=0,
                    max_task_retries=0,
                    num_cpus=resources.get("CPU", 0),
                    num_gpus=resources.get("GPU", 0),
                    scheduling_strategy=PlacementGroupSchedulingStrategy(
                        placement_group=self._group, placement_group_bundle_index=bundle
                    ),
                )
                .remote()
            )
            self._actors.append(actor)
            self._runs.append(actor.run.remote(spec))  # type: ignore[attr-defined]

    def exit_reason(self) -> str | None:
        ended, _ = ray.wait(self._runs, num_returns=len(self._runs), timeout=0)
        for run in ended:
            try:
                ray.get(run)
            except ray.exceptions.RayError as error:
                return str(error).strip().splitlines()[0]
        return None

    def stop(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._runs = [], []
        if self._own_group is not None:
            remove_placement_group(self._own_group)
            self._own_group = None

    def _wait_for_place(self) -> None:
        """Waits for the group's bundles, saying now and then what for. Raises ResourceError at the end."""
        started = time.monotonic()
        while not self._group.wait(_NOTICE_PERIOD_S):
            waited = time.monotonic() - started
            needed = f"{len(self._group.bundle_specs)} bundles of {self._group.bundle_specs[-1]}"
            free = {name: ray.available_resources().get(name, 0.0) for name in self._group.bundle_specs[-1]}
            if waited > self._config.start_timeout_s:
                raise ResourceError(
                    f"no place for {needed} within {waited:.0f} s; free in the cluster: {free}"
                )
            _log.warning("waiting for %s; free in the cluster: %s", needed, free)

    def _bundles_by_node(self) -> list[int]:
        """The ranks' bundles grouped by node, the first one's node first: PACK keeps no such order, and what
        can stay on a node should."""
        nodes = placement_group_table(self._group)["bundles_to_node_id"]
        bundles = range(self._first_bundle, len(self._group.bundle_specs))
        order: dict[str, int] = {}
        for bundle in bundles:
            order.setdefault(nodes[bundle], len(order))
        return sorted(bundles, key=lambda bundle: order[nodes[bundle]])
