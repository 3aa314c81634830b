"""Ranks in other processes and in Ray actors: they answer, they fail with their reason, they end."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.util import placement_group_table

from qwen3_dist import LLM, EngineConfig, Layout, SamplingParams
from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.errors import (
    CheckpointError,
    ConfigError,
    EngineDeadError,
    ParallelLayoutError,
    ResourceError,
)
from qwen3_dist.launch.ray_ranks import choose_device, rank_bundles
from qwen3_dist.model.reference import load_reference
from tests.checkpoints import write_checkpoint
from tests.processes import processes_running, wait_until_gone
from tests.ranks import ROOT, end_nursery

GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=None, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module", autouse=True)
def no_processes_of_other_tests() -> None:
    end_nursery()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("moe"), moe=True)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def placed_groups() -> list[str]:
    return [group["state"] for group in placement_group_table().values() if group["state"] != "REMOVED"]


def test_ray_ranks_generate_the_reference_tokens_and_leave_nothing(local_ray: None, checkpoint: Path) -> None:
    with LLM(str(checkpoint), layout="tp=2,ep=2", executor="ray", use_tqdm=False) as llm:
        output = llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)[0]
        assert placed_groups() == ["CREATED"]
    assert output.token_ids == load_reference(checkpoint).generate_greedy([5, 6, 7], 8)
    assert output.text is None  # the checkpoint has no tokenizer
    assert placed_groups() == []
    wait_until_gone("ray::RankActor")


def test_a_killed_ray_rank_fails_its_requests_and_frees_its_place(local_ray: None, checkpoint: Path) -> None:
    async def scenario() -> float:
        engine = AsyncEngine(EngineConfig(str(checkpoint), layout=Layout(tp=2, ep=2), executor="ray"))
        steps = engine.generate([1, 2, 3], ENDLESS, "a")
        await anext(steps)
        os.kill(processes_running("ray::RankActor")[1], signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(EngineDeadError, match="died"):
            async for _ in steps:
                pass
        noticed = time.monotonic() - killed
        with pytest.raises(EngineDeadError):
            engine.check_health()
        engine.shutdown()
        return noticed

    assert asyncio.run(scenario()) < 5
    assert placed_groups() == []
    wait_until_gone("ray::RankActor")


def test_a_rank_killed_while_the_engine_idles_turns_its_health_bad(checkpoint: Path) -> None:
    engine = AsyncEngine(EngineConfig(str(checkpoint), layout=Layout(tp=2), executor="processes"))
    engine.check_health()
    os.kill(processes_running("qwen3_dist.launch.processes")[0], signal.SIGKILL)
    deadline = time.monotonic() + 5
    with pytest.raises(EngineDeadError, match="died"):
        while time.monotonic() < deadline:
            engine.check_health()
            time.sleep(0.05)
    engine.shutdown()
    wait_until_gone("qwen3_dist.launch.processes")


def test_ranks_end_with_the_process_that_had_them_even_when_it_is_killed(checkpoint: Path) -> None:
    script = (
        "import sys; from qwen3_dist import LLM; llm = LLM(sys.argv[1], layout='tp=2', executor='processes',"
    )
    script += " use_tqdm=False); print('ready', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(checkpoint)]
    owner = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None and owner.stdout.readline() == "ready\n"
    assert len(processes_running("qwen3_dist.launch.processes")) == 3  # two ranks and what forked them
    owner.kill()
    owner.communicate()
    wait_until_gone("qwen3_dist.launch.processes")


def test_an_abandoned_request_frees_its_blocks(checkpoint: Path) -> None:
    async def scenario() -> None:
        engine = AsyncEngine(EngineConfig(str(checkpoint)))
        steps = engine.generate([1, 2, 3], ENDLESS, "a")
        await anext(steps)
        assert engine.stats().num_running == 1
        await steps.aclose()
        deadline = time.monotonic() + 5
        while engine.stats().free_blocks != engine.stats().total_blocks:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        assert engine.stats().num_running == 0
        engine.shutdown()

    asyncio.run(scenario())


def test_parts_that_would_come_too_fast_hold_several_steps_and_nobody_waits_for_the_last(
    checkpoint: Path,
) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)

    async def parts(parts_per_s: float) -> list[list[int]]:
        engine = AsyncEngine(EngineConfig(str(checkpoint)), parts_per_s=parts_per_s)
        found = [
            [token for delta in deltas for token in delta.token_ids]
            async for deltas in engine.generate([1, 2, 3], params, "a")
        ]
        engine.shutdown()
        return found

    first, rest = asyncio.run(parts(1e-6))
    assert (len(first), len(rest)) == (1, 11)
    assert sum(asyncio.run(parts(math.inf)), []) == first + rest


@pytest.mark.parametrize("parts_per_s", [1e-6, math.inf])
def test_all_tokens_that_were_computed_before_an_engine_died_come_ahead_of_the_error(
    parts_per_s: float,
) -> None:
    engine = AsyncEngine(EngineConfig(device="cpu", num_blocks=256), parts_per_s=parts_per_s)
    tokens: list[int] = []

    async def outlive() -> None:
        async for deltas in engine.generate([1, 2, 3], ENDLESS, "a"):
            tokens.extend(token for delta in deltas for token in delta.token_ids)
            while engine.stats().steps < 9:  # the event loop stands still: all that follows is taken at once
                time.sleep(0.001)
            engine.shutdown()

    with pytest.raises(EngineDeadError, match="was shut down"):
        asyncio.run(outlive())
    assert len(tokens) == engine.stats().steps  # each step computed one


def test_a_request_that_comes_while_the_engine_dies_is_told() -> None:
    engine = AsyncEngine(EngineConfig(device="cpu", num_blocks=256))
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        go.wait()

    def die() -> None:
        raise EngineDeadError("a rank was lost")

    async def ask() -> None:
        asked = asyncio.ensure_future(anext(engine.generate([1, 2, 3], ENDLESS, "a")))
        while len(engine._inbox) < 2:
            await asyncio.sleep(0)
        go.set()
        await asyncio.wait_for(asked, 30)

    engine._post(hold)
    held.wait()
    engine._post(die)  # and then, in the same breath, the request
    with pytest.raises(EngineDeadError, match="a rank was lost"):
        asyncio.run(ask())
    engine.shutdown()


def test_a_checkpoint_that_ranks_cannot_load_is_reported_as_such(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, moe=False)
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(config.replace('"intermediate_size": 96', '"intermediate_size": 98'))
    with pytest.raises(CheckpointError, match=r"has shape \[96, 64\] where config.json makes it \[98, 64\]"):
        LLM(str(path), layout="tp=2", executor="processes", use_tqdm=False)
    wait_until_gone("qwen3_dist.launch.processes")


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        ({"layout": "tp=3"}, ParallelLayoutError, "n_heads=8 is not divisible by tp=3; tp=1, 2, 4, 8 work"),
        ({"layout": "tp=2,ep=3"}, ParallelLayoutError, "ep=3 does not divide dp\\*tp=2; ep=1, 2 work"),
        ({"layout": "pp=5"}, ParallelLayoutError, "pp=5 is more than n_layers=4; pp=4 is the most"),
        ({"max_model_len": 10_000}, ConfigError, "exceeds the model's context of 512"),
        ({"num_blocks": 4, "max_model_len": 512}, ConfigError, "does not fit the KV cache of 64 tokens"),
        ({"device": "cuda"}, ResourceError, "sees no GPU"),
        ({"layout": "tp=2", "executor": "in_process"}, ConfigError, "runs one rank"),
    ],
)
def test_what_cannot_run_is_refused_in_one_sentence(
    checkpoint: Path, settings: dict[str, object], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        LLM(str(checkpoint), use_tqdm=False, **settings)  # type: ignore[arg-type]


def test_gpus_that_the_cluster_lacks_are_named(local_ray: None) -> None:
    with pytest.raises(ResourceError, match="needs 4 GPUs and the Ray cluster has 0"):
        choose_device(EngineConfig(layout=Layout(tp=2), device="cuda"), replicas=2)
    assert choose_device(EngineConfig(layout=Layout(tp=2))) == "cpu"


def test_cpu_ranks_may_outnumber_cores_with_one_warning(
    local_ray: None, caplog: pytest.LogCaptureFixture
) -> None:
    config = EngineConfig(layout=Layout(tp=4))
    assert rank_bundles(config, "cpu", replicas=2) == [{"CPU": 0.8}]
    assert [record.message for record in caplog.records] == [
        "8 CPU ranks share 80% of 2 CPUs: this works, and is slower than one core per rank"
    ]
    assert rank_bundles(EngineConfig(layout=Layout(tp=2, dp=2)), "cpu") == [{"CPU": 0.8}] * 2


def test_a_tp_group_that_no_node_has_room_for_may_cross_nodes_with_a_warning(
    local_ray: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert rank_bundles(EngineConfig(layout=Layout(tp=2)), "cuda") == [{"CPU": 0.8, "GPU": 1.0}] * 2
    assert "no node has {'CPU': 1.6, 'GPU': 2.0} for the 2 ranks of a tp group" in caplog.text


TWO_NODES = """
import sys, ray
from ray.cluster_utils import Cluster
from qwen3_dist import LLM, SamplingParams

checkpoint, cpus_of_a_node, *layouts = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": int(cpus_of_a_node)})
cluster.add_node(num_cpus=int(cpus_of_a_node))
cluster.connect()
params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
for layout in layouts:
    with LLM(checkpoint, layout=layout, executor="ray", cpus_per_rank=1.0, use_tqdm=False) as llm:
        group = next(g for g in ray.util.placement_group_table().values() if g["state"] == "CREATED")
        assert len(set(group["bundles_to_node_id"].values())) == 2, group
        print(len(group["bundles"]), llm.generate([[5, 6, 7]], params, use_tqdm=False)[0].token_ids)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.parametrize(
    ("cpus_of_a_node", "layouts"),
    [
        pytest.param(  # no node has room for a tp group of two; `test_two_hosts` has the same layouts
            1, {"tp=2,ep=2": 2, "dp=2,ep=2": 2, "pp=2": 2}, marks=pytest.mark.slow
        ),
        (2, {"tp=2,dp=2,ep=4": 2, "tp=2,pp=2,ep=2": 2}),  # a bundle for each tp group, on one node
    ],
)
def test_ranks_on_two_ray_nodes_give_what_one_gives(
    checkpoint: Path, cpus_of_a_node: int, layouts: dict[str, int]
) -> None:
    """Two raylets of one machine, neither with room for all ranks."""
    command = [sys.executable, "-c", TWO_NODES, str(checkpoint), str(cpus_of_a_node), *layouts]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    tokens = load_reference(checkpoint).generate_greedy([5, 6, 7], 8)
    lines = ended.stdout.strip().splitlines()[-len(layouts) :]
    assert lines == [f"{bundles} {tokens}" for bundles in layouts.values()]
