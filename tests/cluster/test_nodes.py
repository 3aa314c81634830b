"""A node that is drained ends empty, and the requests that run there end first."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster

from cluster import nodes, ray_private
from qwen3_dist.errors import ResourceError


@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 1}, graceful_shutdown_timeout_s=30)
class Held:
    """Holds a request until it is released."""

    def __init__(self) -> None:
        self._released = False

    async def hold(self) -> str:
        import asyncio

        while not self._released:
            await asyncio.sleep(0.05)
        return "ended"

    async def release(self) -> None:
        self._released = True


@pytest.fixture
def two_nodes() -> Iterator[tuple[str, Cluster]]:
    """The address of a cluster whose head runs no replicas, and which has a worker with a core."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    try:
        yield cluster.address, cluster
    finally:
        serve.shutdown()
        ray.shutdown()
        ray_private.forget_serve()
        cluster.shutdown()


def test_a_drained_node_ends_its_requests_before_it_is_empty(two_nodes: tuple[str, Cluster]) -> None:
    address, _ = two_nodes
    ray.init(address=address, log_to_driver=False)
    handle = serve.run(Held.bind(), name="held", route_prefix=None)
    running = handle.hold.remote()
    [worker] = [node["NodeID"] for node in ray.nodes() if nodes._HEAD not in node["Resources"]]
    [head] = [node["NodeID"] for node in ray.nodes() if nodes._HEAD in node["Resources"]]
    deadline = time.monotonic() + 60
    while not any(place == worker for place, _ in ray_private.living_actors()):
        assert time.monotonic() < deadline
        time.sleep(0.1)

    assert not nodes.drain(worker, 1.0), "a request still runs there"
    assert not nodes.drain(head, 0.1), "the head outlives the worker"
    handle.release.remote().result(timeout_s=60)
    assert running.result(timeout_s=60) == "ended"
    assert nodes.drain(worker, 60.0)
    assert nodes.drain(head, 60.0)


def test_waiting_for_nodes_ends_with_them_or_says_how_many_are_missing(
    two_nodes: tuple[str, Cluster],
) -> None:
    address, _ = two_nodes
    nodes.wait_for_nodes(address, 2, 60.0)
    with pytest.raises(ResourceError, match="has 2 of 3 nodes"):
        nodes.wait_for_nodes(address, 3, 1.0)
    with pytest.raises(ResourceError, match="no Ray cluster answers"):
        nodes.wait_for_nodes("127.0.0.1:1", 1, 0.1)
