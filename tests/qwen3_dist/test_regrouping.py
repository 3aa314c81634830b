"""An engine that lost a rank and gets no other: dp groups leave, and come back when ranks start again."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen3_dist.engine import regrouping
from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.errors import EngineDeadError
from qwen3_dist.launch.launcher import Launcher
from tests import failing_ranks
from tests.quantized import write_fp8
from tests.recovering import before_step, config, started, undisturbed, whole_tokens

PROMPTS = [(5, 6, 7, 8), (9, 8, 7), (1, 2, 3, 4, 5), (11,)]


@pytest.fixture(scope="module")
def checkpoints(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    fp8 = write_fp8(tmp_path_factory.mktemp("fp8"), 24, 20, moe=True, mlp_only_layers=[1])
    return {**checkpoints, "moe fp8": fp8.quantized}


@pytest.fixture
def refusal(checkpoints: dict[str, Path]) -> Callable[[bool], None]:
    """Called with True, it has ranks of the MoE checkpoint not start any more, in the way of `Launcher.main`."""
    files = [path / "refused" for path in checkpoints.values()]

    def refuse(refused: bool) -> None:
        for file in files:
            file.touch() if refused else file.unlink(missing_ok=True)

    refuse(False)
    return refuse


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regrouping, "_FIRST_PAUSE_S", 0.5)
    monkeypatch.setattr(regrouping, "_LAST_PAUSE_S", 1.0)


async def asked_until(
    engine: AsyncEngine, expected: dict[tuple[int, ...], list[int]], done: Callable[[], bool]
) -> int:
    """Asks all prompts at once, again and again, until `done`. Returns how many streams were cut, and went on."""
    cut = 0
    async with asyncio.timeout(120.0):
        while not done():
            answers = await asyncio.gather(*(whole_tokens(engine, prompt) for prompt in expected))
            assert dict(zip(expected, (tokens for tokens, _ in answers), strict=True)) == expected
            cut += sum(cuts > 0 for _, cuts in answers)
    return cut


@pytest.mark.parametrize(
    ("model", "layout", "lost", "smaller", "kept", "how", "most_read", "settings"),
    [
        ("moe fp8", "dp=3,ep=3", 1, "dp=2,ep=2", [0, 2], "ranks_that_end_while_refused", 0.3, {}),
        (
            "moe",
            "dp=3,ep=3",
            0,
            "dp=2,ep=2",
            [1, 2],
            "ranks_that_end_while_refused",
            0.5,
            {"quantize": "int8", "redundant_experts": 10},
        ),
        ("moe", "tp=2,dp=2,ep=4", 1, "tp=2,ep=2", [2, 3], "ranks_that_sleep_while_refused", 0.5, {}),
        ("moe", "dp=2", 0, "tp=1", [1], "ranks_that_cannot_load_while_refused", 1.1, {}),
        ("moe", "tp=2,dp=2,ep=4", 3, "tp=2,ep=2", [0, 1], "ranks_that_end_and_wait_as_in_nccl", 0.5, {}),
        ("dense", "dp=2,pp=2", 2, "pp=2", [1, 3], "ranks_that_end_while_refused", 0.0, {}),
    ],
)
def test_dp_groups_leave_that_lack_a_rank_and_come_back(
    nursery: None,
    checkpoints: dict[str, Path],
    refusal: Callable[[bool], None],
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    layout: str,
    lost: int,
    smaller: str,
    kept: list[int],
    how: str,
    most_read: float,
    settings: dict[str, Any],
) -> None:
    """No stream is lost or changed meanwhile. The ranks that stay keep their processes and read at most the part
    `most_read` of the checkpoint."""
    monkeypatch.setattr(Launcher, "main", staticmethod(getattr(failing_ranks, how)))
    whole = (checkpoints[model] / "model.safetensors").stat().st_size

    async def check() -> None:
        with started(config(checkpoints[model], layout, replacement_timeout_s=4.0, **settings)) as engine:
            expected = {prompt: await undisturbed(engine, prompt) for prompt in PROMPTS}
            before = [rank.pid for rank in engine.ranks]
            made = engine.stats().generation_tokens
            refusal(True)
            asking = asyncio.create_task(
                asked_until(engine, expected, lambda: engine.absence is not None and not engine.recovers)
            )
            await asyncio.sleep(0.05)
            os.kill(before[lost], signal.SIGKILL)
            assert await asking
            assert str(engine.config.layout) == smaller
            assert [rank.pid for rank in engine.ranks] == [before[rank] for rank in kept]
            assert [rank.rank for rank in engine.ranks] == [*range(len(kept))]
            others = set(before) - {rank.pid for rank in engine.ranks}
            assert not any(Path(f"/proc/{pid}").exists() for pid in others), "a rank was left behind"
            assert engine.absence is not None
            assert engine.absence.configured == layout
            assert engine.absence.ranks == tuple(sorted(set(range(len(before))) - set(kept)))
            assert f"rank {lost} died" in engine.absence.reason
            assert "no other rank took its place: " in engine.absence.reason
            left = engine.recoveries[-1]
            assert left.change == "left" and left.bytes_read <= most_read * whole
            refusal(False)
            assert await asked_until(engine, expected, lambda: engine.absence is None)
            assert str(engine.config.layout) == layout
            after = [rank.pid for rank in engine.ranks]
            assert [after[rank] for rank in kept] == [before[rank] for rank in kept]
            assert engine.recoveries[-1].change == "returned"
            assert engine.stats().generation_tokens > made, "the totals began anew"
            await asked_until(engine, expected, iter([False, True]).__next__)

    asyncio.run(check())


def test_what_can_come_back_does_without_the_rest(
    nursery: None,
    checkpoints: dict[str, Path],
    refusal: Callable[[bool], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two lost ranks one starts again. An engine that has not all of its ranks loses another, which is replaced."""
    main = failing_ranks.rank_2_ends_as_it_starts_and_others_while_refused
    monkeypatch.setattr(Launcher, "main", staticmethod(main))

    async def check() -> None:
        with started(config(checkpoints["moe"], "dp=3,ep=3", replacement_timeout_s=5.0)) as engine:
            expected = {prompt: await undisturbed(engine, prompt) for prompt in PROMPTS}
            pids = [rank.pid for rank in engine.ranks]
            refusal(True)
            for rank in (1, 2):
                os.kill(pids[rank], signal.SIGKILL)
            await asked_until(engine, expected, lambda: _layout(engine) == "tp=1")
            assert [rank.pid for rank in engine.ranks] == pids[:1]
            refusal(False)
            await asked_until(engine, expected, lambda: _layout(engine) == "dp=2,ep=2")
            assert engine.absence is not None and engine.absence.ranks == (2,)
            os.kill(engine.ranks[0].pid, signal.SIGKILL)
            await asked_until(engine, expected, lambda: engine.recoveries[-1].change == "replaced")
            assert engine.recoveries[-1].ranks == (0,) and _layout(engine) == "dp=2,ep=2"

    asyncio.run(check())


def _layout(engine: AsyncEngine) -> str:
    return str(engine.config.layout) if not engine.recovers else ""


def test_a_rank_that_is_lost_again_before_a_step_leaves(
    nursery: None, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        with started(config(checkpoints["moe"], "dp=2,ep=2")) as engine:
            expected = {prompt: await undisturbed(engine, prompt) for prompt in PROMPTS}
            sound, main = Launcher.main, failing_ranks.ranks_that_end_in_their_first_step
            monkeypatch.setattr(Launcher, "main", staticmethod(main))
            lost = engine.ranks[1].pid
            before_step(engine, 10, lambda: os.kill(lost, signal.SIGKILL))
            assert await asked_until(engine, expected, lambda: engine.absence is not None)
            assert [each.change for each in engine.recoveries[:2]] == ["replaced", "left"]
            monkeypatch.setattr(Launcher, "main", staticmethod(sound))
            await asked_until(engine, expected, lambda: _layout(engine) == "dp=2,ep=2")

    asyncio.run(check())


def test_an_engine_ends_that_has_no_group_to_spare(
    nursery: None,
    checkpoints: dict[str, Path],
    refusal: Callable[[bool], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    main = staticmethod(failing_ranks.ranks_that_end_while_refused)
    monkeypatch.setattr(Launcher, "main", main)
    died = threading.Event()

    async def check() -> None:
        with started(config(checkpoints["moe"], "tp=2,ep=2"), on_death=died.set) as engine:
            refusal(True)
            os.kill(engine.ranks[1].pid, signal.SIGKILL)
            assert await asyncio.to_thread(died.wait, 60.0)
            with pytest.raises(EngineDeadError, match="rank 1 died: its process ended by SIGKILL"):
                engine.check_health()

    asyncio.run(check())
    assert "no other rank took its place: a rank ended before it was ready: rank 1" in caplog.text
