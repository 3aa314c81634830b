"""Ranks that hang: found by their silence, or since a step makes no progress, and named."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.errors import EngineDeadError
from qwen3_dist.launch import rank_watch
from qwen3_dist.launch.launcher import Launcher
from qwen3_dist.launch.rank_watch import Hang, RankWatch
from qwen3_dist.protocol.channel import Channel, ChannelListener, connect
from qwen3_dist.protocol.messages import RankSpec, RankStatus
from tests import failing_ranks

_SECRET = bytes(32)
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


def started(checkpoint: Path, layout: str = "tp=2") -> LLM:
    """An engine whose steps may take 300 s, so that only its watch can find what these tests plant."""
    return LLM(str(checkpoint), layout=layout, executor="processes", use_tqdm=False, num_blocks=64)


@pytest.mark.parametrize("layout", ["tp=1", "tp=2,pp=2"])
def test_a_stopped_rank_is_named_by_its_silence(
    nursery: None, checkpoints: dict[str, Path], layout: str
) -> None:
    with started(checkpoints["dense"], layout) as llm:
        llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)
        last = len(llm._engine.ranks) - 1
        os.kill(llm._engine.ranks[last].pid, signal.SIGSTOP)
        with pytest.raises(EngineDeadError, match=f"^rank {last} did not answer for 3 s: stopped"):
            llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)


@pytest.mark.parametrize(
    ("main", "log"),
    [
        (failing_ranks.rank_1_sleeps_in_a_step, "rank 0, running step 4, awaits (1,)"),
        (failing_ranks.rank_1_sleeps_in_a_step_over_gloo, "rank 0, running step 4, awaits nobody"),
    ],
    ids=["shared memory", "gloo"],
)
def test_a_rank_that_is_stuck_in_a_step_is_named_and_all_stacks_are_logged(
    nursery: None,
    checkpoints: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    main: Callable[[RankSpec], None],
    log: str,
) -> None:
    monkeypatch.setattr(Launcher, "main", staticmethod(main))
    with started(checkpoints["dense"]) as llm:
        expected = "rank 1 made no progress while running step 4 and kept the others waiting for"
        with pytest.raises(EngineDeadError, match=f"^{expected}"):
            llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)
    assert log in caplog.text
    assert "time.sleep(100_000)" in caplog.text.partition("rank 1, running step 4")[2]


class Ranks:
    """Ranks whose answers a test writes, and the clock of the watch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(rank_watch.time, "monotonic", lambda: self.now)
        self.watch = RankWatch(timeout_s=4.0)
        self._ends: list[Channel] = []
        listener = ChannelListener("127.0.0.1", _SECRET)
        for rank in range(2):
            self._ends.append(connect(listener.address, _SECRET))
            channel = listener.accept(timeout_s=10.0)
            assert channel is not None
            self.watch.add(rank, channel)
        listener.close()

    def run(
        self, seconds: float, operations: Callable[[int], int], answering: tuple[int, ...] = (0, 1)
    ) -> Hang | None:
        """What the watch finds while a step runs for `seconds`, in which ranks of `answering` answer and have entered
        `operations(look)` collectives."""
        for look in range(int(seconds / 0.25)):
            self.now += 0.25
            if found := self.watch.look():
                return found
            for rank in answering:
                while self._ends[rank].readable():
                    self._ends[rank].receive()
                    self._ends[rank].send(RankStatus("running step 7", operations(look), (), "stack"))
        return None


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(monkeypatch)


def test_a_slow_step_that_makes_progress_does_not_hang(ranks: Ranks) -> None:
    ranks.watch.begin(limit_s=4.0)
    assert ranks.run(60.0, operations=lambda look: look // 4) is None
    hang = ranks.run(60.0, operations=lambda look: 15)
    assert hang is not None and hang.ranks == [0, 1]
    assert hang.message.startswith("ranks 0, 1 made no progress while running step 7 for 6")


def test_a_step_without_a_limit_may_take_as_long_as_it_wants(ranks: Ranks) -> None:
    ranks.watch.begin(limit_s=None)
    assert ranks.run(250.0, operations=lambda look: 0) is None


def test_a_rank_that_falls_silent_in_a_long_step_is_named(ranks: Ranks) -> None:
    ranks.watch.begin(limit_s=100.0)
    assert ranks.run(20.0, operations=lambda look: 0) is None
    hang = ranks.run(20.0, operations=lambda look: 0, answering=(0,))
    assert hang is not None and hang.ranks == [1] and hang.message.startswith("rank 1 did not answer for 3 s")


def test_time_in_which_the_engine_did_not_run_does_not_count(ranks: Ranks) -> None:
    ranks.watch.begin(limit_s=4.0)
    assert ranks.run(2.0, operations=lambda look: 0, answering=()) is None
    ranks.now += 1000.0
    assert ranks.watch.look() is None
