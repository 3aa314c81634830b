"""A node that is drained ends empty, and the requests that run there end first."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster

from cluster import nodes, ray_private
from qwen3_dist.errors import ResourceError
from serve_app.app import build_model


@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 1}, graceful_shutdown_timeout_s=30)
class Held:
    """Holds a request until a file exists: a draining replica takes no second request that could release it."""

    async def hold(self, files: str) -> str:
        (Path(files) / "held").touch()
        while not (Path(files) / "released").exists():
            await asyncio.sleep(0.05)
        return "ended"


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A cluster of a head that runs no replicas, as KubeRay deploys on, with this process connected to it."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield cluster
    finally:
        ray.shutdown()
        ray_private.forget_serve()
        cluster.shutdown()


def test_a_drained_node_ends_its_requests_before_it_is_empty(cluster: Cluster, tmp_path: Path) -> None:
    cluster.add_node(num_cpus=1)
    handle = serve.run(Held.bind(), name="held", route_prefix=None)
    running = handle.hold.remote(str(tmp_path))
    [worker] = [node["NodeID"] for node in ray.nodes() if nodes._HEAD not in node["Resources"]]
    [head] = [node["NodeID"] for node in ray.nodes() if nodes._HEAD in node["Resources"]]
    deadline = time.monotonic() + 60
    while not (tmp_path / "held").exists():  # a request that waits for a replica is not one of the node's
        assert time.monotonic() < deadline
        time.sleep(0.1)

    assert not nodes.drain(worker, 1.0), "a request still runs there"
    assert not nodes.drain(head, 0.1), "the head outlives the worker"
    (tmp_path / "released").touch()
    assert running.result(timeout_s=60) == "ended"
    assert nodes.drain(worker, 60.0)
    assert nodes.drain(head, 60.0)


def test_waiting_for_nodes_ends_with_them_or_says_how_many_are_missing(cluster: Cluster) -> None:
    cluster.add_node(num_cpus=1)
    ray.shutdown()  # it connects by itself
    nodes.wait_for_nodes(cluster.address, 2, 60.0)
    with pytest.raises(ResourceError, match="has 2 of 3 nodes"):
        nodes.wait_for_nodes(cluster.address, 3, 1.0)
    with pytest.raises(ResourceError, match="no Ray cluster answers"):
        nodes.wait_for_nodes("127.0.0.1:1", 1, 0.1)


def test_a_model_that_is_deployed_before_its_nodes_have_joined_waits_for_them(cluster: Cluster) -> None:
    model = {"layout": "tp=1", "device": "cpu", "cpus_per_rank": 0.5}
    with pytest.raises(ResourceError, match="need .* CPUs and the Ray cluster has 0"):
        build_model({**model, "start_timeout_s": 0.1})
    with ThreadPoolExecutor() as pool:
        built = pool.submit(build_model, {**model, "start_timeout_s": 120})
        cluster.add_node(num_cpus=1)
        assert built.result(timeout=120)
