"""Ranks as Ray actors in the bundles of a placement group. Ray places, watches and ends them; plans and results travel
over our own channels (`protocol/channel.py`).

    bundles of an engine of its own:   [tp group 0] [tp group 1] ...
    bundles of a Serve replica:        [replica] [tp group 0] [tp group 1] ...

A bundle is on one node, so the ranks of a tp group share a node, while ep and pp may cross nodes. If no node has room
for a tp group, each rank gets a bundle of its own.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
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
from qwen3_dist.launch.launcher import Launcher
from qwen3_dist.layout import Layout
from qwen3_dist.machine import cores
from qwen3_dist.protocol.messages import RankSpec
from qwen3_dist.rank_env import openmp_environment
from qwen3_dist.settings import EngineConfig

_log = logging.getLogger(__name__)
_NOTICE_PERIOD_S = 10.0
LEAST_CPUS = 0.1  # of a rank: more ranks mostly wait for each other to get a core


def cluster_resources() -> dict[str, float]:
    """The total resources of the connected Ray cluster; without a cluster, the cores of this machine."""
    return ray.cluster_resources() if ray.is_initialized() else {"CPU": float(cores())}


def most_cpu_ranks() -> int:
    """The ranks with which each has a tenth of a CPU of the cluster."""
    return int(cluster_resources().get("CPU", 0.0) / LEAST_CPUS + 1e-6)


def check_cpus(layout: Layout, replicas: int = 1) -> None:
    """Raises ResourceError if the ranks of `replicas` engines on CPUs would have less than a tenth of a CPU each."""
    if layout.world * replicas > (most := most_cpu_ranks()):
        raise ResourceError(
            f"{replicas} replica(s) of {layout.world} CPU rank(s) are too many for the Ray cluster's "
            f"{cluster_resources().get('CPU', 0.0):g} CPUs; {most} ranks each have a tenth of a CPU; set "
            "cpus_per_rank for more"
        )


def choose_device(config: EngineConfig, replicas: int = 1) -> str:
    """ "cuda" or "cpu" for `replicas` engines of `config`, by the GPUs of the connected Ray cluster.

    Raises ResourceError if the cluster can never hold them. Without a cluster `device=auto` means "cpu".
    """
    if not ray.is_initialized():
        return "cuda" if config.device == "cuda" else "cpu"
    needed = config.layout.world * replicas
    gpus = int(cluster_resources().get("GPU", 0))
    if config.device == "cpu" or (config.device == "auto" and gpus == 0):
        return "cpu"
    if gpus < needed and not (config.share_gpus and gpus):
        what = f"{replicas} replicas of {config.layout}" if replicas > 1 else f"layout {config.layout}"
        share = ", set share_gpus=true" if gpus else ""
        raise ResourceError(
            f"{what} needs {needed} GPUs and the Ray cluster has {gpus}; add GPUs{share}, use a smaller layout "
            "or device=cpu"
        )
    return "cuda"


def rank_bundles(config: EngineConfig, device: str, replicas: int = 1) -> list[dict[str, float]]:
    """The placement-group bundles of a replica's ranks, sized so that `replicas` engines fit the cluster.

    A GPU rank takes one GPU; with `share_gpus` and too few GPUs, an even part of one. A CPU rank takes one CPU; with
    too few CPUs, an even part of 80% of the cluster's. Either shortage is only a warning, so that any layout can be
    tried on a small machine.
    """
    layout = config.layout
    ranks = layout.world * replicas
    total, cpus = cluster_resources().get("CPU", 0.0), config.cpus_per_rank
    if cpus is None:
        share = total * 0.8 / ranks
        cpus = 1.0 if share >= 1 else max(0.01, int(share * 100) / 100)
        if cpus < 1 and device == "cpu":
            _log.warning(
                "%d CPU ranks share 80%% of %g CPUs: this works, and is slower than one core per rank",
                ranks,
                total,
            )
    rank, group = {"CPU": cpus}, {"CPU": round(cpus * layout.tp, 2)}
    if device == "cuda":
        sharing = _ranks_on_card(config, replicas)
        rank["GPU"], group["GPU"] = part_of_card(1, sharing), _gpus_of(layout.tp, sharing)
    if any(all(node.get(name, 0) >= amount for name, amount in group.items()) for node in _nodes()):
        return [dict(group) for _ in range(layout.world // layout.tp)]
    if layout.tp > 1:
        _log.warning("no node has %s for the %d ranks of a tp group, so it may cross nodes", group, layout.tp)
    return [dict(rank) for _ in range(layout.world)]


def ranks_per_host(ranks: int, cpus: float) -> int:
    """The most of `ranks` CPU ranks, each reserving `cpus` CPUs, that Ray may place on one node of the cluster."""
    largest = max((node.get("CPU", 0.0) for node in _nodes()), default=0.0)
    return max(1, min(ranks, int(largest / cpus + 1e-6)))


def part_of_card(gpus: float, ranks: int) -> float:
    """The GPUs of each of `ranks` ranks that share `gpus` GPUs. Ray counts in ten-thousandths and grants more than
    one GPU only as whole ones."""
    if gpus >= ranks:
        return float(gpus // ranks)
    sharing = ranks / gpus if gpus < 1 else -(-ranks // int(gpus))
    return int(10_000 / sharing) / 10_000


def _gpus_of(ranks: int, sharing: int) -> float:
    """GPUs of a bundle of `ranks` ranks, `sharing` of them on each."""
    return float(-(-ranks // sharing)) if ranks >= sharing else int(10_000 * ranks / sharing) / 10_000


def _ranks_on_card(config: EngineConfig, replicas: int) -> int:
    """The fewest ranks on each GPU with which `replicas` engines fit the cluster."""
    ranks, tp = config.layout.world * replicas, config.layout.tp
    gpus = int(cluster_resources().get("GPU", 0))
    if not config.share_gpus or gpus >= ranks or not gpus:
        return 1
    for sharing in range(2, ranks + 1):
        groups_fit = gpus // -(-tp // sharing) if tp >= sharing else gpus * (sharing // tp)
        if groups_fit >= ranks // tp:
            break
    _log.warning("%d ranks share %d GPUs, %d on each: for checks, not for speed", ranks, gpus, sharing)
    return sharing


def _cause(error: ray.exceptions.RayError) -> str:
    """The cause of an actor's failure in one line, the last line of Ray's message."""
    if isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
        return f"{type(error.cause).__name__}: {' '.join(str(error.cause).split())}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _nodes() -> list[dict[str, float]]:
    """The total resources of each node; without a cluster, the cores of this machine."""
    if not ray.is_initialized():
        return [cluster_resources()]
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _current_group(layout: Layout) -> PlacementGroup:
    """The placement group of this process. Raises ResourceError if its bundles are not those of a replica."""
    current = ray.util.get_current_placement_group()
    sizes = sorted({layout.world // layout.tp, layout.world})
    if current is None or current.bundle_count - 1 not in sizes:
        bundles = f"{current.bundle_count} bundles" if current is not None else "none"
        raise ResourceError(
            f"placement=current needs a placement group of 1 + {' or '.join(map(str, sizes))} bundles for layout "
            f"{layout} and this process has {bundles}; use placement=own"
        )
    return current


class RankActor:
    """The actor of one rank; `run` returns when the rank has ended."""

    def run(self, main: Callable[[RankSpec], None], spec: RankSpec) -> None:
        main(replace(spec, card=given_card()) if spec.device == "cuda" else spec)


def given_card() -> int:
    """The index of the GPU that Ray gave this actor, among those that the process sees.

    That is 0 where Ray hides the others. It may be told not to (RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES).
    """
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    given = [str(name) for name in ray.get_gpu_ids()]
    if len(visible) == 1 or not given:
        return 0
    return visible.index(given[0]) if given[0] in visible else int(given[0])


class RayLauncher(Launcher):
    """Places ranks in a new placement group, or with `placement=current` in the group of the Serve replica that this
    process belongs to."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self.host = ray.util.get_node_ip_address()
        self._actors: dict[int, Any] = {}  # by seat
        self._runs: dict[int, Any] = {}
        self._bundles: list[int] = []  # of each seat; it stays when Ray places a lost node's bundle elsewhere
        self._own_group: PlacementGroup | None = None
        if config.placement == "current":
            self._group, self._first_bundle = _current_group(config.layout), 1
            self.device = "cuda" if "GPU" in self._group.bundle_specs[1] else "cpu"
        else:
            self.device = choose_device(config)
            bundles = rank_bundles(config, self.device)
            self._own_group = placement_group(bundles, strategy="PACK")
            self._group, self._first_bundle = self._own_group, 0

    def launch(self, specs: list[RankSpec]) -> None:
        self._wait_for_place()
        self._bundles = self._bundles_of_seats(len(specs))
        for spec in specs:
            self.replace(spec, spec.rank)

    def replace(self, spec: RankSpec, seat: int) -> None:
        self.end([seat])
        bundle, together = self._bundles[seat], len(self._bundles) // len(set(self._bundles))
        variables = {**(openmp_environment() if self.device == "cpu" else {}), **self._config.rank_env}
        reserved = self._group.bundle_specs[bundle]
        actor = (
            ray.remote(RankActor)
            .options(
                max_restarts=0,
                max_task_retries=0,
                num_cpus=reserved.get("CPU", 0) / together,
                num_gpus=part_of_card(reserved["GPU"], together) if self.device == "cuda" else 0,
                runtime_env={"env_vars": variables} if variables else None,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=self._group, placement_group_bundle_index=bundle
                ),
            )
            .remote()
        )
        self._actors[seat] = actor
        self._runs[seat] = actor.run.remote(self.main, spec)  # type: ignore[attr-defined]

    def end(self, seats: Iterable[int]) -> None:
        for seat in seats:
            if seat in self._actors:
                ray.kill(self._actors.pop(seat))
                del self._runs[seat]

    def exit_reason(self, seats: Mapping[int, int]) -> str | None:
        runs = {rank: self._runs[seat] for rank, seat in seats.items() if seat in self._runs}
        ended, _ = ray.wait([*runs.values()], num_returns=len(runs), timeout=0) if runs else ([], [])
        for rank, run in runs.items():
            try:
                if run in ended:
                    ray.get(run)
            except ray.exceptions.RayError as error:
                return f"rank {rank}: {_cause(error)}"
        return None

    def stop(self) -> None:
        self.end([*self._actors])
        if self._own_group is not None:
            remove_placement_group(self._own_group)
            self._own_group = None

    def _wait_for_place(self) -> None:
        """Waits for the group's bundles and logs what it waits for. Raises ResourceError at the timeout."""
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

    def _bundles_of_seats(self, world: int) -> list[int]:
        """The bundle of each seat. Bundles are grouped by node, the first bundle's node first, so that neighbouring
        ranks share a node. PACK keeps no such order."""
        nodes = placement_group_table(self._group)["bundles_to_node_id"]
        bundles = range(self._first_bundle, len(self._group.bundle_specs))
        order: dict[str, int] = {}
        for bundle in bundles:
            order.setdefault(nodes[bundle], len(order))
        by_node = sorted(bundles, key=lambda bundle: order[nodes[bundle]])
        return [by_node[rank // (world // len(by_node))] for rank in range(world)]
