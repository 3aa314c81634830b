"""Ranks that fail, stop or never come: what the engine tells, of real processes."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3_dist import LLM, EngineConfig, Layout, SamplingParams
from qwen3_dist.errors import EngineDeadError, ResourceError
from qwen3_dist.launch.launcher import Launcher
from qwen3_dist.launch.processes import Nursery, ProcessLauncher, shared_nursery
from qwen3_dist.launch.rank_group import RankGroupExecutor
from qwen3_dist.protocol.messages import RankSpec
from qwen3_dist.worker.runner import ModelRunner
from tests import failing_ranks
from tests.ranks import end_nursery

GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def nursery() -> Iterator[None]:
    end_nursery()
    with shared_nursery():
        yield


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[RankSpec], None]], None]:
    """Has ranks run another function in place of `rank_main`."""
    return lambda main: monkeypatch.setattr(Launcher, "main", staticmethod(main))


def config(checkpoint: Path, **settings: Any) -> EngineConfig:
    return EngineConfig(str(checkpoint), layout=Layout(tp=2), executor="processes", num_blocks=64, **settings)


def start(settings: EngineConfig) -> RankGroupExecutor:
    return RankGroupExecutor(settings, ProcessLauncher(settings))


def test_a_rank_that_runs_out_of_memory_says_so_while_others_wait_for_it(
    nursery: None, checkpoints: dict[str, Path], failing: Callable[..., None]
) -> None:
    failing(failing_ranks.rank_1_runs_out_of_memory)
    with (
        LLM(
            str(checkpoints["dense"]), layout="tp=2", executor="processes", use_tqdm=False, num_blocks=64
        ) as llm,
        pytest.raises(ResourceError) as caught,
    ):
        llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)
    assert str(caught.value) == (
        "rank 1 ran out of memory while running step 2 (CUDA out of memory. Tried to allocate 2 GiB); lower "
        "max_num_batched_tokens, max_num_seqs or gpu_memory_utilization, or use more ranks"
    )


@pytest.mark.parametrize(
    ("main", "sentence"),
    [
        (failing_ranks.rank_1_fails_before_it_says_anything, "rank 1: OSError: No route to host that engine"),
        (
            failing_ranks.rank_0_cannot_meet_others,
            "rank 0 failed while starting: RuntimeError: The server socket has failed to listen",
        ),
    ],
)
def test_a_failure_before_the_first_message_is_told_with_its_rank_and_cause(
    nursery: None,
    checkpoints: dict[str, Path],
    failing: Callable[..., None],
    main: Callable[[RankSpec], None],
    sentence: str,
) -> None:
    failing(main)
    with pytest.raises(EngineDeadError, match=sentence):
        start(config(checkpoints["dense"]))


def test_a_resource_that_a_rank_lacks_is_told_with_its_rank_and_host(
    nursery: None, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    told = f"rank [01] on {socket.gethostname()}: the rank's process sees no GPU: .* built without CUDA"
    with pytest.raises(ResourceError, match=told):
        start(config(checkpoints["dense"], device="cuda"))


def test_a_module_that_ranks_cannot_import_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "qwen3_dist").mkdir()
    (tmp_path / "qwen3_dist" / "__init__.py").write_text("import a_library_that_is_not_there\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    nursery = Nursery()
    with pytest.raises(ResourceError, match="cannot: ModuleNotFoundError: .*'a_library_that_is_not_there'"):
        nursery.launch(print, [""])
    nursery.close()


def test_the_engine_does_not_wait_for_a_rank_that_stopped_reading(
    nursery: None, checkpoints: dict[str, Path]
) -> None:
    executor = start(config(checkpoints["dense"], step_timeout_s=2.5))  # rank 0 reads all meanwhile
    stopped = executor.ranks[1].pid
    os.kill(stopped, signal.SIGSTOP)
    more_than_a_socket_holds = bytes(24 << 20)
    with pytest.raises(EngineDeadError) as caught:
        executor.call("__eq__", more_than_a_socket_holds)
    assert str(caught.value) == (
        "rank 1 did not answer __eq__ within 2.5 s; rank 1 stopped reading what the engine sends"
    )


def test_what_does_not_fit_a_socket_arrives_when_it_is_read(
    nursery: None, checkpoints: dict[str, Path]
) -> None:
    executor = start(config(checkpoints["dense"]))
    slow = executor.ranks[1].pid
    os.kill(slow, signal.SIGSTOP)
    goes_on = threading.Timer(0.5, os.kill, (slow, signal.SIGCONT))
    goes_on.start()
    assert executor.call("__eq__", bytes(64 << 20)) == [NotImplemented] * 2
    assert executor.call("__eq__", 1) == [NotImplemented] * 2
    executor.shutdown()


def test_a_step_that_is_not_answered_names_step_and_ranks(
    nursery: None, checkpoints: dict[str, Path]
) -> None:
    with LLM(
        str(checkpoints["dense"]),
        layout="tp=2",
        executor="processes",
        use_tqdm=False,
        num_blocks=64,
        step_timeout_s=2.0,
    ) as llm:
        os.kill(llm._engine.ranks[1].pid, signal.SIGSTOP)
        with pytest.raises(EngineDeadError, match="rank 1 did not answer within 2 s"):
            llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)


def test_a_rank_that_stops_is_named_over_gloo_too(
    nursery: None, checkpoints: dict[str, Path], failing: Callable[..., None]
) -> None:
    failing(failing_ranks.ranks_over_gloo)
    path = str(checkpoints["dense"])
    options = {"executor": "processes", "use_tqdm": False, "num_blocks": 64, "step_timeout_s": 2.0}
    with LLM(path, layout="tp=2", **options) as llm:
        os.kill(llm._engine.ranks[1].pid, signal.SIGSTOP)
        with pytest.raises(EngineDeadError, match=r"rank 1 kept the others waiting: rank 0 .* [Tt]imed out"):
            llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)


def test_a_rank_that_cannot_read_to_the_end_says_so(
    nursery: None, checkpoints: dict[str, Path], failing: Callable[..., None]
) -> None:
    """Its EOFError is not taken for the engine's end."""
    failing(failing_ranks.rank_1_ends_as_it_loads)
    with pytest.raises(EngineDeadError, match="rank 1 failed while loading weights: EOFError: the file ends"):
        start(config(checkpoints["dense"]))


def test_a_ranks_traceback_lies_in_the_file_that_the_error_names(
    nursery: None, checkpoints: dict[str, Path], failing: Callable[..., None], tmp_path: Path
) -> None:
    log = logging.FileHandler(tmp_path / "replica.log")
    logging.getLogger("qwen3_dist").addHandler(log)
    try:
        failing(failing_ranks.rank_1_ends_as_it_loads)
        with pytest.raises(EngineDeadError, match=f"{tmp_path}/replica.log has the traceback"):
            start(config(checkpoints["dense"]))
    finally:
        logging.getLogger("qwen3_dist").removeHandler(log)
        log.close()
    logged = (tmp_path / "replica.log").read_text()
    assert "rank 1 failed:" in logged and "Traceback" in logged and "EOFError: the file ends" in logged


def test_a_rank_that_is_killed_is_named_once_with_the_signal(
    nursery: None, checkpoints: dict[str, Path]
) -> None:
    executor = start(config(checkpoints["dense"]))
    os.kill(executor.ranks[1].pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError) as caught:
        executor.call("compiled_kernels")
    assert str(caught.value) == "rank 1 died: its process ended by SIGKILL"


def test_graphs_are_dropped_before_the_groups_are_left(
    nursery: None, checkpoints: dict[str, Path], failing: Callable[..., None]
) -> None:
    """NCCL does not give up a communicator that a graph has captured."""
    failing(failing_ranks.notes_its_end)
    start(config(checkpoints["dense"])).shutdown()
    assert [(checkpoints["dense"] / f"end-{rank}").read_text() for rank in (0, 1)] == ["graphs groups"] * 2


def test_ranks_whose_groups_cannot_be_left_end_all_the_same(
    nursery: None, checkpoints: dict[str, Path], failing: Callable[..., None]
) -> None:
    failing(failing_ranks.ranks_whose_groups_are_never_left)
    executor = start(config(checkpoints["dense"]))
    executor.shutdown()
    for rank in executor.ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(rank.pid, 0)


def test_memory_that_runs_out_in_the_engines_own_process_is_told_alike(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    with LLM(str(checkpoints["dense"]), device="cpu", use_tqdm=False, num_blocks=64) as llm:
        monkeypatch.setattr(ModelRunner, "launch", launch)
        with pytest.raises(ResourceError, match="rank 0 ran out of memory while running a step .*; lower"):
            llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)
