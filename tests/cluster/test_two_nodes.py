"""Sweeps and calibration on two Ray nodes: raylets of this machine, each with a CPU and a GPU that is not there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from cluster.calibration import collective_probe
from cluster.calibration.between_nodes import cluster_links
from serve_app.cli import main
from tests.ranks import end_nursery
from tests.stand_in_probe import StandInProbe

WORKLOAD = """\
points:
  - {num_prompts: 2, input_len: 12, output_len: 4}
  - {num_prompts: 3, input_len: 8, output_len: 4, rate: 20}
device: cpu
"""


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    end_nursery()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1})
    try:
        cluster.add_node(num_cpus=1, num_gpus=1)
        yield cluster
    finally:
        cluster.shutdown()


def sweep(cluster: Cluster, folder: Path, *arguments: str) -> list[dict[str, object]]:
    (folder / "w.yaml").write_text(WORKLOAD)
    asked = ["sweep", "bundled", "--workload", str(folder / "w.yaml"), "--out", str(folder / "out"), "--json"]
    assert main([*asked, "--ray-address", cluster.address, *arguments]) == 0
    return [json.loads(file.read_text()) for file in sorted((folder / "out" / "layouts").iterdir())]


def test_a_sweep_runs_ranks_on_several_nodes_and_keeps_every_repeat(
    two_nodes: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No node has two CPUs, so a rank that takes more than half of one shares its node with no other."""
    (found,) = sweep(two_nodes, tmp_path, "--layouts", "tp=2", "--repeats", "2")
    assert found["layout"] == "tp=2" and "error" not in found
    points = found["points"]
    assert isinstance(points, list) and [len(point["repeats"]) for point in points] == [2, 2]
    assert points[1]["point"] == "3×(8→4) at 20/s"
    for point in points:
        assert all(
            each["output_tokens_per_s"] > 0 and each["ttft_ms"]["p90"] > 0 for each in point["repeats"]
        )
    assert "shared memory" in str(found["collectives"])  # of ranks on one machine
    capsys.readouterr()
    assert sweep(two_nodes, tmp_path, "--layouts", "tp=2", "--repeats", "2") == [found]
    assert "1/1 tp=2: done earlier" in capsys.readouterr().err


def test_collectives_between_nodes_are_measured_on_a_card_of_each(two_nodes: Cluster) -> None:
    points, counts = cluster_links("cuda", two_nodes.address, print, StandInProbe)
    assert counts == [1, 1]
    check(points)


@pytest.mark.slow
def test_collectives_between_nodes_are_measured_on_a_core_of_each(two_nodes: Cluster) -> None:
    points, counts = cluster_links("cpu", two_nodes.address, print)
    assert counts == [1, 1]
    check(points)


def check(points: dict[str, list[tuple[int, float]]]) -> None:
    assert list(points) == list(collective_probe.COLLECTIVES)
    for kind in points:
        assert [size for size, _ in points[kind]] == list(collective_probe.BYTES)
        assert all(seconds > 0 for _, seconds in points[kind])
    assert collective_probe.link(points).of("all_reduce").bytes_per_s > 0


@pytest.mark.slow
def test_a_sweep_over_http_serves_each_layout(tmp_path: Path) -> None:
    """The client's own figures are tested in `test_bench_serve` and in `test_sweep_child`."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3})
    try:
        (found,) = sweep(cluster, tmp_path, "--layouts", "tp=1", "--http")
    finally:
        cluster.shutdown()
    points = found["points"]
    assert isinstance(points, list) and len(points) == 2
    for point, count in zip(points, (2, 3), strict=True):
        (figures,) = point["repeats"]
        assert (figures["completed"], figures["failed"]) == (count, 0)
        assert figures["output_tokens_per_s"] > 0 and figures["itl_ms"]["p90"] > 0
