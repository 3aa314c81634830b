"""What an engine promises besides tokens: statistics from any thread, and no ranks left when it cannot be made."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.engine import engine as engine_module
from qwen3_dist.engine.engine import Engine
from qwen3_dist.errors import CheckpointError
from qwen3_dist.settings import EngineConfig
from tests.checkpoints import write_checkpoint
from tests.processes import wait_until_gone
from tests.ranks import end_nursery

GREEDY = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
RANKS = "qwen3_dist.launch.processes"


@pytest.fixture(scope="module", autouse=True)
def no_processes_of_other_tests() -> None:
    end_nursery()


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(EngineConfig(device="cpu", num_blocks=4096))
    yield made
    made.shutdown()


def test_statistics_are_those_of_the_last_step_while_another_runs(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.add_request("a", list(range(3, 40)), GREEDY)
    assert engine.stats().num_waiting == 1
    engine.step()
    collect, seen = engine._executor.collect, []

    def collecting(limit_s: float | None) -> object:
        seen.append(engine.stats())
        return collect(limit_s)

    before = engine.stats()
    monkeypatch.setattr(engine._executor, "collect", collecting)
    engine.step()
    assert seen == [before]
    assert engine.stats().steps == before.steps + 1
    assert engine.abort("a")
    after = engine.stats()
    assert (after.num_running, after.free_blocks) == (0, 4096)
    assert after.cached_blocks == 2  # of 37 tokens of the prompt


def test_statistics_can_be_read_by_a_thread_while_the_engine_steps(engine: Engine) -> None:
    problems: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        try:
            while not done.is_set():
                stats = engine.stats()
                assert 0 <= stats.cached_blocks <= stats.free_blocks <= stats.total_blocks
        except BaseException as error:  # noqa: BLE001 - told below
            problems.append(error)

    reader = threading.Thread(target=read)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        reader.start()
        for number in range(8):
            engine.add_request(str(number), [number + 1] * 100, GREEDY)
        while engine.has_work:
            engine.step()
    finally:
        done.set()
        reader.join()
        sys.setswitchinterval(interval)
    assert not problems


def test_end_tokens_that_cannot_be_read_are_refused_before_ranks_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_checkpoint(tmp_path, moe=False)
    (path / "generation_config.json").write_text('{"eos_token_id": "none"}')
    monkeypatch.setattr(engine_module, "make_executor", lambda *arguments: pytest.fail("ranks were started"))
    with pytest.raises(CheckpointError, match="eos_token_id"):
        LLM(str(path), layout="tp=2", executor="processes", use_tqdm=False)


@pytest.mark.parametrize("part", ["RankChanges", "Scheduler", "BlockManager"])
def test_whatever_fails_after_ranks_have_started_leaves_none_behind(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_checkpoint(tmp_path, moe=False)

    def fail(*arguments: object) -> None:
        raise MemoryError("planted")

    monkeypatch.setattr(engine_module, part, fail)
    with pytest.raises(MemoryError, match="planted"):
        LLM(str(path), layout="tp=2", executor="processes", use_tqdm=False)
    wait_until_gone(RANKS)
