"""Measures collectives between two nodes of a Ray cluster: one rank on each, joined as a service's ranks are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
import torch.distributed as dist
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.calibration import collective_probe
from cluster.ray_cluster import joined
from qwen3_dist.errors import ResourceError
from qwen3_dist.launch.ray_ranks import given_card
from qwen3_dist.rank_env import openmp_environment
from qwen3_dist.worker.rendezvous import use_interface_of

_PLACE_WAIT_S = 60.0
Points = dict[str, list[tuple[int, float]]]


class ProbeActor:
    """The actor of one rank, on a node of its own. Rank 0 hosts the rendezvous."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._host = ray.util.get_node_ip_address()
        self._store: dist.TCPStore | None = None

    def open_store(self) -> tuple[str, int]:
        """The address at which ranks meet."""
        self._store = dist.TCPStore(self._host, 0, 2, is_master=True, wait_for_workers=False)
        return self._host, self._store.port

    def measure(self, address: tuple[str, int], device: str) -> Points:
        """As `collective_probe.measure_rank`, over the network even if both nodes are one machine."""
        use_interface_of(self._host)
        store = self._store or dist.TCPStore(*address, 2, is_master=False)
        card = given_card() if device == "cuda" else 0
        return collective_probe.measure_rank(store, 2, device, self._rank, card, shared_memory=False)


def cluster_links(
    device: str, address: str, report: Callable[[str], None], actor: type[ProbeActor] = ProbeActor
) -> tuple[Points, list[int]]:
    """What `measure` returns of the Ray cluster at `address`, and the number of devices of each node that has some."""
    with joined(address):
        report("collectives between two nodes")
        counts = [count for count in per_node("GPU" if device == "cuda" else "CPU") if count]
        return measure(device, actor), counts


def measure(device: str, actor: type[ProbeActor] = ProbeActor) -> Points:
    """(bytes, seconds) of each kind of collective between ranks on two nodes of the Ray cluster that this process has
    joined, as `collective_probe.measure` counts them.

    Each rank takes a GPU of its node, or a CPU. Raises ResourceError if there are no two nodes with one that is free,
    or if a rank fails.
    """
    resource = "GPU" if device == "cuda" else "CPU"
    nodes = sum(bool(count) for count in per_node(resource))
    if nodes < 2:
        raise ResourceError(
            f"the link between nodes needs two nodes with a {resource}, and the Ray cluster has {nodes}; start Ray on "
            "another node, or leave --ray-address out"
        )
    group = placement_group([{resource: 1}] * 2, strategy="STRICT_SPREAD")
    try:
        if not group.wait(_PLACE_WAIT_S):
            raise ResourceError(
                f"no two nodes have a free {resource} within {_PLACE_WAIT_S:g} s; end what runs in the Ray cluster"
            )
        return _measured(group, device, actor)
    except ray.exceptions.RayError as error:
        last = str(error).strip().splitlines()[-1]
        raise ResourceError(f"a rank failed while collectives between nodes were measured: {last}") from None
    finally:
        remove_placement_group(group)


def per_node(resource: str) -> list[int]:
    """How many of a resource each living node has."""
    return [int(node["Resources"].get(resource, 0)) for node in ray.nodes() if node["Alive"]]


def _measured(group: PlacementGroup, device: str, actor: type[ProbeActor]) -> Points:
    needs: dict[str, Any] = {"num_gpus": 1, "num_cpus": 0} if device == "cuda" else {"num_cpus": 1}
    ranks: list[Any] = [
        ray.remote(actor)
        .options(
            **needs,
            max_restarts=0,
            runtime_env={"env_vars": openmp_environment()},
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=rank
            ),
        )
        .remote(rank)
        for rank in range(2)
    ]
    address = ray.get(ranks[0].open_store.remote())
    found: Points = ray.get([rank.measure.remote(address, device) for rank in ranks])[0]
    for rank in ranks:
        ray.kill(rank)
    return found
