"""An engine that lost a rank: the others keep their process and weights, and a new one takes the lost one's place."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from pathlib import Path

import pytest

from qwen3_dist.errors import EngineDeadError
from qwen3_dist.launch.launcher import Launcher
from tests import failing_ranks
from tests.recovering import (
    NUM_TOKENS,
    across_a_loss,
    config,
    started,
    undisturbed,
    until_it_serves,
)


@pytest.mark.parametrize(
    ("model", "layout", "lost", "signal_number"),
    [
        ("dense", "tp=1", 0, signal.SIGKILL),
        ("dense", "tp=2", 0, signal.SIGKILL),
        ("dense", "tp=2", 1, signal.SIGSTOP),
        ("moe", "tp=2,ep=2,dp=2", 3, signal.SIGKILL),
        ("dense", "tp=2,pp=2", 0, signal.SIGKILL),
        ("dense", "tp=2,pp=2", 3, signal.SIGSTOP),
    ],
)
def test_one_new_rank_takes_the_place_of_a_lost_one(
    nursery: None, checkpoints: dict[str, Path], model: str, layout: str, lost: int, signal_number: int
) -> None:
    async def check() -> None:
        with started(config(checkpoints[model], layout)) as engine:
            expected = await undisturbed(engine)
            before = [rank.pid for rank in engine.ranks]
            assert await across_a_loss(engine, lambda: os.kill(before[lost], signal_number)) == expected
            assert engine.stats().generation_tokens >= 2 * NUM_TOKENS, "the totals began anew"
            after = [rank.pid for rank in engine.ranks]
            assert [rank for rank in range(len(before)) if before[rank] != after[rank]] == [lost]
            [recovery] = engine.recoveries
            whole = (checkpoints[model] / "model.safetensors").stat().st_size
            assert recovery.ranks == (lost,)
            assert 0 < recovery.bytes_read < (0.8 if len(before) > 1 else 1.1) * whole

    asyncio.run(check())


def test_ranks_that_wait_in_nccl_are_woken(
    nursery: None, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL's collectives do not fail when a rank is lost. A stand-in, since this machine may have no GPU."""
    monkeypatch.setattr(Launcher, "main", staticmethod(failing_ranks.ranks_that_wait_as_in_nccl))

    async def check() -> None:
        with started(config(checkpoints["moe"], "tp=2,ep=2,dp=2")) as engine:
            expected = await undisturbed(engine)
            lost = engine.ranks[3].pid
            assert await across_a_loss(engine, lambda: os.kill(lost, signal.SIGKILL)) == expected
            assert [recovery.ranks for recovery in engine.recoveries] == [(3,)]

    asyncio.run(check())


def test_an_idle_engine_replaces_a_lost_rank_too(nursery: None, checkpoints: dict[str, Path]) -> None:
    async def check() -> None:
        with started(config(checkpoints["dense"], "tp=2")) as engine:
            expected = await undisturbed(engine)
            os.kill(engine.ranks[0].pid, signal.SIGKILL)
            while not engine.recoveries:
                await asyncio.sleep(0.01)
            await until_it_serves(engine)
            assert await undisturbed(engine) == expected

    asyncio.run(check())


def test_ranks_that_were_moved_experts_have_them_after_a_loss(
    nursery: None, checkpoints: dict[str, Path]
) -> None:
    """The new rank loads the experts of its predecessor and not those of the start."""

    async def check() -> None:
        with started(config(checkpoints["moe"], "tp=2,ep=2", redundant_experts=2)) as engine:
            expected = await undisturbed(engine)
            assert await engine.rebalance_experts(), "nothing has moved"
            moved = (await engine.expert_load()).placements
            lost = engine.ranks[1].pid
            assert await across_a_loss(engine, lambda: os.kill(lost, signal.SIGKILL)) == expected
            load = await engine.expert_load()
            assert load.placements == moved
            assert all(sum(tokens) for tokens in load.tokens.values())

    asyncio.run(check())


def test_who_waits_for_the_engine_is_told_of_a_loss(nursery: None, checkpoints: dict[str, Path]) -> None:
    async def check() -> None:
        with started(config(checkpoints["moe"], "tp=2,ep=2")) as engine:
            os.kill(engine.ranks[1].pid, signal.SIGSTOP)
            waits = [engine.expert_load(), engine.rebalance_experts(), engine.rank_pace()]
            answers = await asyncio.gather(*waits, return_exceptions=True)
            assert [type(answer) for answer in answers] == 3 * [EngineDeadError]
            await until_it_serves(engine)
            assert await engine.expert_load()

    asyncio.run(check())


def test_an_engine_dies_that_loses_a_rank_again_before_its_next_step(
    nursery: None, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    died = threading.Event()

    async def check() -> None:
        with started(config(checkpoints["dense"], "tp=2"), on_death=died.set) as engine:
            main = staticmethod(failing_ranks.ranks_that_end_in_their_first_step)
            monkeypatch.setattr(Launcher, "main", main)
            lost = engine.ranks[1].pid
            with pytest.raises(EngineDeadError):
                await across_a_loss(engine, lambda: os.kill(lost, signal.SIGKILL))
            assert await asyncio.to_thread(died.wait, 60.0)
            assert len(engine.recoveries) == 1 and not engine.recovers

    asyncio.run(check())


def test_an_engine_dies_if_no_rank_can_take_the_place(
    nursery: None, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    died = threading.Event()

    async def check() -> None:
        with started(config(checkpoints["dense"], "tp=2"), on_death=died.set) as engine:
            monkeypatch.setattr(
                Launcher, "main", staticmethod(failing_ranks.rank_1_ends_before_it_says_anything)
            )
            pids = [rank.pid for rank in engine.ranks]
            os.kill(pids[1], signal.SIGKILL)
            assert await asyncio.to_thread(died.wait, 60.0)
            with pytest.raises(EngineDeadError, match="rank 1 died: its process ended by SIGKILL"):
                engine.check_health()
            assert not Path(f"/proc/{pids[0]}").exists(), "the rank that was left still runs"

    asyncio.run(check())
