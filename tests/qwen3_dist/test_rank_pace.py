"""Which rank the others wait for: how ranks measure their own part of a step, and what the engine makes of it."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.engine import rank_pace
from qwen3_dist.engine.rank_pace import RankPaces
from qwen3_dist.launch import processes
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.worker.own_time import OwnTime
from tests import planted_ranks
from tests.checkpoints import write_checkpoint
from tests.ranks import by_name, run_ranks

PARAMS = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


@pytest.mark.usefixtures("nursery")
@pytest.mark.parametrize("layout", ["tp=2", "tp=2,ep=2", "dp=2,ep=2", "pp=2"])
def test_the_rank_that_is_planted_slower_is_the_slowest(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = str(write_checkpoint(tmp_path, moe="ep" in layout))
    monkeypatch.setattr(
        processes.ProcessLauncher, "main", by_name(planted_ranks.rank_of_which_the_second_is_slow)
    )
    with LLM(
        checkpoint, layout=layout, executor="processes", dtype="float32", num_blocks=64, use_tqdm=False
    ) as llm:
        assert llm._engine.paces.read() is None  # no step has run
        monkeypatch.setattr(rank_pace, "_PERIOD_S", 0.0)
        llm.generate([[5, 6, 7], [8, 9]], PARAMS, use_tqdm=False)
        pace = llm._engine.paces.read()
        assert pace is not None and pace.slowest == 1
        assert pace.step_s[1] >= planted_ranks.SLOW_S
        assert llm._engine.paces.read() == pace  # no step since


def test_a_ranks_own_part_is_the_time_in_its_steps_less_its_waits() -> None:
    parallel = SimpleNamespace(waited_s=1.0)
    own_time = OwnTime(parallel)  # type: ignore[arg-type]
    assert own_time.read() == (0, 0.0)
    own_time.add(0.5)
    own_time.add(2.0)
    parallel.waited_s = 2.75
    assert own_time.read() == (2, 0.75)
    parallel.waited_s = None
    assert own_time.read() is None


def check_waits(parallel: ParallelContext) -> None:
    tp = parallel.tp
    tp.barrier()
    before, cpu_before = parallel.waited_s, tp.waited_s
    assert before is not None and cpu_before is not None
    arrived = []
    for _ in range(3):
        if tp.rank == 1:
            time.sleep(0.1)
        arrived.append(time.perf_counter())
        tp.all_reduce(torch.ones(4))
    after = parallel.waited_s
    assert after is not None
    waited = tp.all_gather(torch.tensor([after - before]))
    # A busy machine makes either rank late: what counts is when each came.
    first, second = tp.all_gather(torch.tensor([arrived], dtype=torch.float64))
    assert waited[0] > 0.6 * (second - first).clamp(min=0).sum(), waited
    assert waited[1] < waited[0] + (first - second).clamp(min=0).sum(), waited


@pytest.mark.parametrize(("shared_memory", "staged"), [(True, False), (False, False), (True, True)])
def test_a_rank_knows_how_long_it_waited_for_another(shared_memory: bool, staged: bool) -> None:
    run_ranks(check_waits, "tp=2", shared_memory, staged)


class Ranks:
    """An executor whose ranks tell `told`."""

    def __init__(self, *told: tuple[int, float] | None) -> None:
        self.ranks, self.told, self.asked = tuple(told), list(told), 0

    def call(self, method: str) -> list[Any]:
        assert method == "read_own_time"
        self.asked += 1
        return list(self.told)


def paces_of(ranks: Ranks) -> RankPaces:
    return RankPaces(ranks)  # type: ignore[arg-type]


def test_the_pace_is_that_of_the_steps_since_the_last_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(rank_pace, "time", SimpleNamespace(monotonic=lambda: now[0]))
    ranks = Ranks((10, 5.0), (10, 1.0), (10, 1.0))
    paces = paces_of(ranks)
    first = paces.read()
    assert first is not None and first.slowest == 0 and first.excess == pytest.approx(4)
    ranks.told = [(20, 6.0), (20, 2.0), (20, 2.2)]
    assert paces.read() is first and ranks.asked == 1  # a moment later
    now[0] += 2
    second = paces.read()
    assert second is not None and second.slowest == 2 and second.excess == pytest.approx(0.2)
    assert second.step_s == pytest.approx((0.1, 0.1, 0.12)) and second.total_s == (6.0, 2.0, 2.2)


def test_ranks_that_do_not_know_are_asked_once_and_one_rank_never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_pace, "_PERIOD_S", 0.0)
    for ranks, asked in ((Ranks(None, None), 1), (Ranks((10, 5.0)), 0)):
        paces = paces_of(ranks)
        assert paces.read() is None and paces.read() is None
        assert ranks.asked == asked
