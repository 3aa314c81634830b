"""Which ranks an engine runs without some that it cannot have: the rule alone, without processes."""

from __future__ import annotations

import dataclasses

import pytest

from qwen3_dist import EngineConfig, Layout
from qwen3_dist.config import ModelConfig
from qwen3_dist.engine.engine_stats import counts_of_groups
from qwen3_dist.engine.grouping import goes_without, grouping_without
from qwen3_dist.engine.scheduler_counts import SchedulerCounts
from qwen3_dist.errors import EngineDeadError, ResourceError
from qwen3_dist.parallel.context import ParallelContext

MOE = ModelConfig(
    vocab_size=64,
    emb_dim=16,
    n_layers=2,
    n_heads=4,
    n_kv_groups=2,
    head_dim=4,
    context_length=64,
    hidden_dim=32,
    moe_hidden_dim=8,
    num_experts=8,
    num_experts_per_tok=2,
)
DENSE = dataclasses.replace(MOE, num_experts=0)


@pytest.mark.parametrize(
    ("layout", "absent", "smaller", "seats"),
    [
        ("dp=4,ep=4", {1}, "dp=3,ep=3", (0, 2, 3)),
        ("dp=4,ep=4", {0, 3}, "dp=2,ep=2", (1, 2)),
        ("tp=2,dp=2,ep=4", {1}, "tp=2,ep=2", (2, 3)),  # the group's other rank leaves, too
        ("tp=2,dp=2,ep=2", {2}, "tp=2", (0, 1)),  # two ranks share the columns of an expert, as before
        ("tp=2,dp=3,ep=6", {0, 1}, "tp=2,dp=2,ep=4", (2, 3, 4, 5)),
        ("dp=2", {0}, "tp=1", (1,)),
        ("dp=3,pp=2,ep=3", {4}, "dp=2,pp=2,ep=2", (0, 2, 3, 5)),  # the group leaves every stage
        ("dp=4,ep=4", set(), "dp=4,ep=4", (0, 1, 2, 3)),
    ],
)
def test_the_dp_groups_stay_that_lack_no_rank(
    layout: str, absent: set[int], smaller: str, seats: tuple[int, ...]
) -> None:
    grouping = grouping_without(EngineConfig("m", layout=Layout.parse(layout)), MOE, absent)
    assert grouping is not None
    assert (str(grouping.config.layout), grouping.seats) == (smaller, seats)
    for placement in grouping.placements.values():
        assert len(placement.hosted) == grouping.config.layout.ep
        assert {expert for hosted in placement.hosted for expert in hosted} == set(range(8))


def test_a_dense_model_goes_on_with_fewer_groups_too() -> None:
    grouping = grouping_without(EngineConfig("m", layout=Layout(dp=3, tp=2)), DENSE, {2})
    assert grouping is not None and str(grouping.config.layout) == "tp=2,dp=2"
    assert grouping.seats == (0, 1, 4, 5) and not grouping.placements


@pytest.mark.parametrize(("layout", "absent"), [("tp=2", {1}), ("dp=2,ep=2", {0, 1}), ("pp=2", {0})])
def test_nothing_is_left_without_a_whole_group(layout: str, absent: set[int]) -> None:
    assert grouping_without(EngineConfig("m", layout=Layout.parse(layout)), MOE, absent) is None


def test_ranks_hold_no_more_copies_of_experts_than_there_are_experts() -> None:
    config = EngineConfig("m", layout=Layout(dp=3, ep=3), redundant_experts=16)  # all on all ranks
    grouping = grouping_without(config, MOE, {2})
    assert grouping is not None and grouping.config.redundant_experts == 8
    alone = grouping_without(config, MOE, {1, 2})
    assert alone is not None and alone.config.redundant_experts == 0


def test_a_rank_that_ends_as_it_starts_is_started_once_more_and_one_without_room_is_not() -> None:
    ended, no_room = EngineDeadError("its process ended"), ResourceError("no place")
    assert not goes_without(1, ended) and goes_without(2, ended) and goes_without(1, no_room)


def test_the_counts_of_groups_that_leave_stay_in_the_totals() -> None:
    before = [SchedulerCounts(steps=3, prompt_tokens=5), SchedulerCounts(steps=4), SchedulerCounts(steps=1)]
    [both] = counts_of_groups(before, 1)
    assert (both.steps, both.prompt_tokens) == (8, 5) and before[0].steps == 3
    assert [each.steps for each in counts_of_groups(before, 4)] == [3, 4, 1, 0]


def test_what_holds_the_tp_group_uses_the_new_one_after_a_change() -> None:
    old, new = ParallelContext.single(), ParallelContext.single()
    new.tp.kind = "of the new layout"
    held = new.with_tp_of(old)
    assert held.tp is old.tp and old.tp.kind == "of the new layout"
    assert held.ep is old.tp, "one group must not have two communicators, of which one goes stale"
