"""Ranks as Ray actors: where they are placed, what they are given, and what is told when they fail to start."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from qwen3_dist import EngineConfig, Layout
from qwen3_dist.engine import regrouping
from qwen3_dist.errors import EngineDeadError, ResourceError
from qwen3_dist.launch.launcher import Launcher
from qwen3_dist.launch.rank_group import RankGroupExecutor
from qwen3_dist.launch.ray_ranks import RayLauncher
from tests import failing_ranks
from tests.ranks import end_nursery
from tests.recovering import PROMPT, across_a_loss, config, started, undisturbed, whole_tokens

LAYOUT = Layout(tp=2)


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    end_nursery()
    ray.init("local", num_cpus=6, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def bundles_taken(placement: str, own_bundles: int) -> str:
    """What a launcher does in a process that Ray has put into a placement group, as Tune and Data do."""
    group = placement_group([{"CPU": 1}] * own_bundles)

    @ray.remote(
        num_cpus=1,
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
        ),
    )
    def make_launcher() -> str:
        try:
            launcher = RayLauncher(EngineConfig(layout=LAYOUT, device="cpu", placement=placement))
        except ResourceError as error:
            return str(error)
        taken = "its own" if launcher._own_group else f"from bundle {launcher._first_bundle} on"
        launcher.stop()
        return taken

    try:
        return ray.get(make_launcher.remote())
    finally:
        remove_placement_group(group)


def test_a_placement_group_is_the_ranks_only_if_the_settings_say_so() -> None:
    assert bundles_taken("own", own_bundles=2) == "its own"  # though it has as many bundles as a replica's
    assert bundles_taken("current", own_bundles=2) == "from bundle 1 on"
    assert bundles_taken("current", own_bundles=4) == (
        "placement=current needs a placement group of 1 + 1 or 2 bundles for layout tp=2 and this process has "
        "4 bundles; use placement=own"
    )


def test_actors_have_the_environment_of_ranks(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Launcher, "main", staticmethod(failing_ranks.tells_its_environment))
    config = EngineConfig(
        str(checkpoints["dense"]), layout=LAYOUT, num_blocks=64, rank_env={"NCCL_IB_HCA": "mlx5_0"}
    )
    executor = RankGroupExecutor(config, RayLauncher(config))
    assert [variable for variable, *_ in executor.call("joined_with")] == ["mlx5_0"] * 2
    executor.shutdown()
    assert "NCCL_IB_HCA" not in os.environ


@pytest.mark.parametrize(
    ("main", "sentence"),
    [
        (failing_ranks.rank_1_fails_before_it_says_anything, "rank 1: OSError: No route to host that engine"),
        (failing_ranks.rank_1_ends_before_it_says_anything, "rank 1: .*exit"),
        (failing_ranks.rank_0_cannot_meet_others, "rank 0 failed while starting: RuntimeError: The server"),
    ],
)
def test_an_actor_that_fails_before_its_first_message_is_told_with_its_rank_and_cause(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, main: object, sentence: str
) -> None:
    monkeypatch.setattr(Launcher, "main", staticmethod(main))  # type: ignore[arg-type]
    config = EngineConfig(str(checkpoints["dense"]), layout=LAYOUT, num_blocks=64)
    with pytest.raises(EngineDeadError, match=sentence) as caught:
        RankGroupExecutor(config, RayLauncher(config))
    print(caught.value)


def test_dp_groups_leave_while_an_actor_does_not_start_and_come_back(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an actor does for which Ray has no place: it is waited for, and then the engine goes on without it."""
    monkeypatch.setattr(regrouping, "_FIRST_PAUSE_S", 0.5)
    monkeypatch.setattr(regrouping, "_LAST_PAUSE_S", 1.0)
    main = failing_ranks.ranks_that_sleep_while_refused
    monkeypatch.setattr(Launcher, "main", staticmethod(main))
    refusal = checkpoints["moe"] / "refused"

    async def check() -> None:
        settings = config(checkpoints["moe"], "dp=2,ep=2", executor="ray", replacement_timeout_s=8.0)
        with started(settings) as engine:
            expected = await undisturbed(engine)
            before = [rank.pid for rank in engine.ranks]
            refusal.touch()
            assert await across_a_loss(engine, lambda: os.kill(before[0], signal.SIGKILL)) == expected
            assert engine.absence is not None and engine.absence.ranks == (0,)
            assert "rank 0 did not start within 8 s" in engine.absence.reason
            assert [rank.pid for rank in engine.ranks] == before[1:]
            refusal.unlink()
            async with asyncio.timeout(120.0):
                while engine.absence is not None or engine.recovers:
                    assert (await whole_tokens(engine, PROMPT))[0] == expected
            assert str(engine.config.layout) == "dp=2,ep=2"
            assert [rank.pid for rank in engine.ranks][1:] == before[1:]
            assert await undisturbed(engine) == expected

    asyncio.run(check())
