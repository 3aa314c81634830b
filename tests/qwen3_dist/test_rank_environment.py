"""What ranks are given: environment variables, and how hosts and process groups are set up."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest

from qwen3_dist import EngineConfig, Layout
from qwen3_dist.errors import ConfigError, ResourceError
from qwen3_dist.launch import ray_ranks
from qwen3_dist.launch.in_process import InProcessExecutor
from qwen3_dist.launch.launcher import Launcher
from qwen3_dist.launch.processes import ProcessLauncher, shared_nursery
from qwen3_dist.launch.rank_group import RankGroupExecutor
from qwen3_dist.rank_env import openmp_environment
from qwen3_dist.worker import rendezvous, shard
from serve_app import placement
from serve_app.cli import build_parser
from serve_app.settings import read_service_config
from tests import failing_ranks
from tests.ranks import end_nursery


@pytest.fixture(scope="module")
def nursery() -> Iterator[None]:
    end_nursery()
    with shared_nursery():
        yield


def test_ranks_have_the_environment_they_are_given_when_they_join(
    nursery: None, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Launcher, "main", staticmethod(failing_ranks.tells_its_environment))
    config = EngineConfig(
        str(checkpoints["dense"]),
        layout=Layout(tp=2),
        executor="processes",
        num_blocks=64,
        step_timeout_s=77.0,
        rank_env={"NCCL_IB_HCA": "mlx5_0", "GLOO_SOCKET_IFNAME": "lo"},
    )
    executor = RankGroupExecutor(config, ProcessLauncher(config))
    assert executor.call("joined_with") == [("mlx5_0", "lo", "1000", [timedelta(seconds=77)])] * 2
    executor.shutdown()
    assert "NCCL_IB_HCA" not in os.environ


def test_a_rank_in_the_engines_process_sets_them_there(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEEN_BY_RANKS", "")  # so that what is set here ends with this test
    config = EngineConfig(str(checkpoints["dense"]), rank_env={"SEEN_BY_RANKS": "yes"}, num_blocks=8)
    InProcessExecutor(config, {}).shutdown()
    assert os.environ["SEEN_BY_RANKS"] == "yes"


def test_gloo_listens_where_the_engine_reaches_the_rank_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that what is set here ends with this test
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    rendezvous.use_interface_of("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    names = ["lo", "eth7"]
    monkeypatch.setattr("socket.if_nameindex", lambda: list(enumerate(names)))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    rendezvous.use_interface_of("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
    names.remove("eth7")
    with pytest.raises(
        ResourceError, match=r"GLOO_SOCKET_IFNAME names 'eth7' and the interfaces of .* are lo; "
    ):
        rendezvous.use_interface_of("127.0.0.1")


def test_the_group_of_a_replica_is_for_ranks_in_ray_alone() -> None:
    with pytest.raises(ConfigError, match="placement=current needs executor=ray, not processes"):
        EngineConfig(placement="current", executor="processes")


@pytest.mark.parametrize("what", ["hostname", "boot", "shared memory"])
def test_hosts_of_one_name_are_told_apart(what: str) -> None:
    here, stat = rendezvous.host_id(), os.stat
    other = {
        "hostname": mock.patch("socket.gethostname", lambda: "elsewhere"),
        "boot": mock.patch.object(Path, "read_text", lambda _: "another boot"),
        "shared memory": mock.patch(
            "os.stat", lambda path, **more: stat("/proc" if path == "/dev/shm" else path, **more)
        ),
    }
    with other[what]:
        assert rendezvous.host_id() != here
    assert rendezvous.host_id() == here


def test_the_environment_of_ranks_can_be_given_as_a_mapping_and_on_the_command_line() -> None:
    wanted = {"NCCL_DEBUG": "INFO", "NCCL_IB_HCA": "mlx5_0=1"}
    assert read_service_config({"rank_env": wanted}).models[0].replica.engine.rank_env == wanted
    words = ["serve", "--rank-env", "NCCL_DEBUG=INFO", "--rank-env", "NCCL_IB_HCA=mlx5_0=1"]
    given = build_parser().parse_args(words).rank_env
    assert read_service_config({"rank_env": given}).models[0].replica.engine.rank_env == wanted


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("NCCL_DEBUG", "rank_env must be NAME=VALUE, not 'NCCL_DEBUG'"),
        (["A=1", "A=2"], "rank_env sets A twice"),
        ({"NCCL_DEBUG": 1}, "value of NCCL_DEBUG in rank_env must be a string, not 1; quote numbers"),
        ({"": "x"}, "letters, digits and _, not ''"),
        ({"A B": "x"}, "letters, digits and _, not 'A B'"),
        ({"A=B": "x"}, "letters, digits and _, not 'A=B'"),
        ({"A\0": "x"}, "letters, digits and _"),
        ({"A": "x\0y"}, "gives A a value with a NUL character"),
        (7, "must map names to values"),
        ({"CUDA_VISIBLE_DEVICES": "0"}, "must not set CUDA_VISIBLE_DEVICES"),
        ({"MASTER_ADDR": "x"}, "must not set MASTER_ADDR, which the engine sets"),
        ({"OMP_NUM_THREADS": "4"}, "must not set OMP_NUM_THREADS, which threads_per_rank sets"),
        ({"PATH": "/x"}, "must not set PATH"),
        ({"LD_PRELOAD": "x.so"}, "must not set LD_PRELOAD, which a process reads only as it starts"),
    ],
)
def test_an_environment_that_cannot_be_given_is_refused(given: object, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read_service_config({"rank_env": given})


def test_threads_of_cpu_ranks_wait_asleep_unless_the_operator_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert openmp_environment() == {"GOMP_SPINCOUNT": "1000"}
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert openmp_environment() == {}


@pytest.mark.parametrize(
    ("settings", "ranks_on_host", "threads"),
    [
        ({}, 1, 8),
        ({}, 2, 4),
        ({"ranks_per_host": 4}, 2, 2),
        ({"ranks_per_host": 1}, 4, 2),
        ({"ranks_per_host": 20}, 1, 1),
        ({"ranks_per_host": 4, "threads_per_rank": 3}, 2, 3),
    ],
)
def test_a_rank_computes_with_its_share_of_the_cores_among_all_that_the_host_may_hold(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, int], ranks_on_host: int, threads: int
) -> None:
    given: list[int] = []
    monkeypatch.setattr(shard, "cores", lambda: 8)
    monkeypatch.setattr("torch.set_num_threads", given.append)
    shard.set_threads(EngineConfig(**settings), ranks_on_host)  # type: ignore[arg-type]
    assert given == [threads]


@pytest.mark.parametrize(
    ("ranks", "cpus", "most"), [(2, 1.0, 2), (100, 1.0, 16), (100, 2.0, 8), (3, 0.5, 3), (1, 32.0, 1)]
)
def test_a_host_may_hold_as_many_ranks_as_its_cpus_have_room_for(
    monkeypatch: pytest.MonkeyPatch, ranks: int, cpus: float, most: int
) -> None:
    monkeypatch.setattr(ray_ranks, "_nodes", lambda: [{"CPU": 4.0}, {"CPU": 16.0}, {}])
    assert ray_ranks.ranks_per_host(ranks, cpus) == most


@pytest.mark.parametrize(("replicas", "layout", "most"), [(1, "tp=1", 1), (2, "tp=1", 2), (2, "tp=2", 4)])
def test_replicas_of_a_service_share_the_cores_of_their_host(
    monkeypatch: pytest.MonkeyPatch, replicas: int, layout: str, most: int
) -> None:
    monkeypatch.setattr(ray_ranks, "_nodes", lambda: [{"CPU": 64.0}])
    monkeypatch.setattr(placement, "cluster_resources", lambda: {"CPU": 64.0})
    settings = {"max_replicas": replicas, "layout": layout, "device": "cpu", "cpus_per_rank": 1}
    assert placement.place(read_service_config(settings).models[0]).engine.ranks_per_host == most
