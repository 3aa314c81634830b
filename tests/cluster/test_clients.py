"""What clients see: by hand on steps of a second, and against the simulator, which runs the engine's scheduler."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import accumulate
from statistics import fmean

import pytest

from cluster.hardware import parse_gpus
from cluster.planning.clients import closed_loop, open_loop, spread_out
from cluster.planning.cost_model import CostModel, StepShape
from cluster.planning.dp_groups import step_seconds
from cluster.planning.official import find_config
from cluster.planning.walk import Request, Served, StepRules, Walk, Workload
from cluster.simulation.arrivals import Lengths, PoissonArrivals
from cluster.simulation.replica import ReplicaConfig
from cluster.simulation.service import ServiceSimulation, simulate
from qwen3_dist.layout import Layout
from qwen3_dist.protocol.step_limits import SchedulerLimits

RULES = StepRules(max_num_batched_tokens=100, max_num_seqs=8, capacity_tokens=1000)


def second(shape: StepShape) -> float:
    """Every step takes a second."""
    return 1.0


def served(rules: StepRules, *requests: Request, depth: int = 1) -> list[Served]:
    found = Walk(second, rules, turnaround_s=0.0, depth=depth).serve(requests)
    return sorted(found, key=lambda each: (each.sent_s, each.first_s))


def times(found: list[Served]) -> list[tuple[float, float]]:
    return [(each.first_s, each.last_s) for each in found]


def test_a_lone_request_takes_a_step_for_each_chunk_and_each_token() -> None:
    (one,) = served(RULES, Request(250, 4))
    assert (one.ttft_s, one.itl_s, one.last_s) == (3.0, 1.0, 6.0)


def test_prompts_share_a_steps_tokens_beside_decodes_first() -> None:
    # 100 tokens: both prompts of 50. The third needs 60: 2 decodes leave 98, so one step more.
    found = served(RULES, Request(50, 5), Request(50, 5), Request(99, 2, 0.5))
    assert times(found) == [(1.0, 5.0), (1.0, 5.0), (3.0, 4.0)]


def test_who_arrives_during_a_step_waits_for_the_steps_in_flight() -> None:
    requests = (Request(10, 9), Request(10, 2, 1.5))
    assert served(RULES, *requests, depth=1)[1].first_s == 3.0
    assert served(RULES, *requests, depth=2)[1].first_s == 4.0


def test_a_follower_comes_when_the_answer_ends() -> None:
    found = served(RULES, Request(10, 2, followers=2))
    assert [(each.sent_s, each.last_s) for each in found] == [(0.0, 2.0), (2.0, 4.0), (4.0, 6.0)]


def test_a_full_cache_preempts_the_youngest_which_is_computed_again() -> None:
    # 2 x 10 tokens fit into 24; after two steps more the younger leaves, and comes back when the older has ended.
    rules = replace(RULES, capacity_tokens=24)
    older, younger = served(rules, Request(10, 8), Request(10, 8))
    assert older.last_s == 8.0 and younger.first_s == 1.0 and younger.last_s > 12.0
    reserved = served(replace(rules, reserves=True), Request(10, 8), Request(10, 8))
    assert times(reserved) == [(1.0, 8.0), (9.0, 16.0)]


def test_other_engines_rules() -> None:
    one_prompt = served(replace(RULES, max_prompts=1), Request(10, 2), Request(10, 2))
    assert [each.first_s for each in one_prompt] == [1.0, 2.0]
    # The first decodes only when the prompt that came later is done.
    prompts_first = served(replace(RULES, prompts_first=True), Request(10, 3), Request(200, 2, 0.5))
    assert times(prompts_first) == [(1.0, 5.0), (3.0, 4.0)]


@pytest.fixture(scope="module")
def model() -> CostModel:
    return CostModel(find_config("Qwen3-8B")[1], Layout(), replace(parse_gpus("1xH100"), num_devices=1))


@pytest.mark.parametrize("layout", [Layout(), Layout(pp=3)])
def test_a_remembered_step_is_the_models(layout: Layout) -> None:
    model = CostModel(find_config("Qwen3-8B")[1], layout, parse_gpus("8xH100"))
    remembered = step_seconds(model)
    for shape in (
        StepShape(4, 900, 0, 0, 4),
        StepShape(4, 90_000, 0, 0, 4),
        StepShape(4, 100, 512, 9000, 5),
        StepShape(4, 7, 512, 5, 5),
        StepShape(0, 0, 9000, 40_504_500, 1),
    ):
        assert remembered(shape) == pytest.approx(model.step_seconds(shape), rel=1e-4)  # whole tokens


@pytest.mark.parametrize(("input_len", "rate"), [(300, 8.0), (2000, 4.0), (6000, 5.5)])
def test_an_open_loop_is_as_the_engines_scheduler_serves_it(
    model: CostModel, input_len: int, rate: float
) -> None:
    limits = SchedulerLimits(max_num_batched_tokens=2048, max_num_seqs=256)
    capacity = model.kv_capacity_tokens(2048, 256)
    arrivals = PoissonArrivals((rate,), 60.0, Lengths(input_len), Lengths(100))
    real = simulate(ServiceSimulation(ReplicaConfig(capacity // 16, limits)), model, arrivals).recorder
    walk = Walk(step_seconds(model), StepRules(2048, 256, capacity))
    found = walk.serve(Request(input_len, 100, each.arrival_s) for each in arrivals)
    waits = [first - sent for sent, first in zip(real.arrivals_s, real.first_tokens_s, strict=True)]
    ends = [last - sent for sent, last in zip(real.arrivals_s, real.last_tokens_s, strict=True)]
    assert fmean(each.ttft_s for each in found) == pytest.approx(fmean(waits), rel=0.05)
    assert fmean(each.last_s - each.sent_s for each in found) == pytest.approx(fmean(ends), rel=0.03)
    assert max(each.ttft_s for each in found) == pytest.approx(max(waits), rel=0.2)


@pytest.mark.parametrize(("input_len", "rate"), [(300, 30.0), (6000, 5.5)])
def test_dp_groups_take_steps_together_as_in_the_simulator(input_len: int, rate: float) -> None:
    model = CostModel(find_config("Qwen3-30B-A3B")[1], Layout(dp=4, ep=4), parse_gpus("4xH100"))
    limits = SchedulerLimits(max_num_batched_tokens=2048, max_num_seqs=256)
    capacity = model.kv_capacity_tokens(2048, 256)
    arrivals = list(PoissonArrivals((rate,), 40.0, Lengths(input_len), Lengths(100)))
    service = ServiceSimulation(ReplicaConfig(capacity // 16, limits, groups=4))
    real = simulate(service, model, arrivals).recorder
    rules = StepRules(2048, 4 * 256, 4 * capacity, groups=4)
    found = Walk(step_seconds(model), rules).serve(
        Request(input_len, 100, each.arrival_s) for each in arrivals
    )
    ends = [last - sent for sent, last in zip(real.arrivals_s, real.last_tokens_s, strict=True)]
    assert fmean(each.last_s - each.sent_s for each in found) == pytest.approx(fmean(ends), rel=0.1)


def walked(
    model: CostModel, rules: StepRules, load: Workload, rate: float, batch: int
) -> tuple[float, float]:
    """Mean TTFT and ITL of random arrivals, of which the first are left out: `batch` are in the replica later on."""
    early, counted = max(300, 3 * batch), max(1600, 4 * batch)
    random_s = random.Random(0)
    times = accumulate(random_s.expovariate(rate) for _ in range(early + counted + batch))
    found = Walk(step_seconds(model, 0, rules.max_num_batched_tokens), rules).serve(
        load.request._replace(arrival_s=each) for each in times
    )
    found = sorted(found, key=lambda each: each.sent_s)[early : early + counted]
    return fmean(each.ttft_s for each in found), fmean(each.itl_s for each in found)


@pytest.mark.parametrize(
    ("layout", "tokens", "input_len", "batch"),
    [
        (Layout(), 2048, 300, 4), (Layout(), 2048, 300, 64), (Layout(), 2048, 2000, 16), (Layout(), 2048, 6000, 8),
        (Layout(dp=4, ep=4), 2048, 300, 100), (Layout(dp=4, ep=4), 2048, 300, 700),
        (Layout(dp=4, ep=4), 2048, 2000, 150), (Layout(dp=4, ep=4), 2048, 6000, 100),
        (Layout(tp=2, dp=4), 8192, 6000, 50), (Layout(tp=2, dp=4), 8192, 6000, 230),
    ],
)  # fmt: skip
def test_the_steady_state_is_near_the_walk(layout: Layout, tokens: int, input_len: int, batch: int) -> None:
    name = "Qwen3-30B-A3B" if layout.ep > 1 else "Qwen3-8B"
    model = CostModel(find_config(name)[1], layout, parse_gpus(f"{layout.world}xH100"))
    dp, load = layout.dp, Workload(input_len, 200)
    rules = StepRules(tokens, 256 * dp, dp * model.kv_capacity_tokens(tokens, 256), None, dp)
    formula = spread_out(model, rules, load, batch, batch)
    ttft_s, itl_s = walked(model, rules, load, formula.requests_per_s, batch)
    assert formula.itl_s == pytest.approx(itl_s, rel=0.1)
    assert formula.ttft_s - model.cluster.outside_s(input_len) == pytest.approx(ttft_s, rel=0.15)


def test_more_requests_than_prompts_can_be_read_for_wait(model: CostModel) -> None:
    rules = StepRules(2048, 4096, 10**9)
    found = [spread_out(model, rules, Workload(1000, 100), batch, batch) for batch in (150, 300, 1200)]
    rates = [each.requests_per_s for each in found]
    assert rates == sorted(rates) and rates[2] < 1.1 * rates[1]
    assert found[2].itl_s == pytest.approx(found[1].itl_s, rel=0.05) and found[2].ttft_s > 4 * found[1].ttft_s


def test_beyond_its_capacity_an_open_loop_falls_behind_the_rate(model: CostModel) -> None:
    rules = StepRules(2048, 16, 100_000)
    seen = open_loop(model, rules, Workload(1000, 100), 1000.0, 400)
    assert seen.requests_per_s < 100 and seen.ttft_p99_s > seen.ttft_p50_s > 1.0


def test_a_closed_loop_begins_together(model: CostModel) -> None:
    rules = StepRules(2048, 256, model.kv_capacity_tokens(2048, 256), max_prompts=1)
    one, all_once, ten = (closed_loop(model, rules, Workload(1000, 200), 32, number) for number in (1, 3, 10))
    assert one.ttft_s > all_once.ttft_s > ten.ttft_s  # all wait for all others, once
    assert ten.ttft_p50_s < ten.ttft_s < ten.ttft_p99_s
    assert ten.requests_per_s == pytest.approx(32 / (ten.ttft_s + 199 * ten.itl_s), rel=0.05)


def test_the_mean_is_that_of_the_requests(model: CostModel) -> None:
    rules = StepRules(2048, 256, 100_000)
    walk = Walk(step_seconds(model), rules).serve([Request(500, 10)] * 3)
    seen = closed_loop(model, rules, Workload(500, 10), 3, requests_each=1)
    before_s = model.cluster.outside_s(500)
    assert seen.ttft_s == pytest.approx(fmean(each.ttft_s for each in walk) + before_s)


def test_cached_prefixes_are_not_computed_but_take_room(model: CostModel) -> None:
    rules = StepRules(2048, 256, model.kv_capacity_tokens(2048, 256))
    for seen in (
        lambda load: spread_out(model, rules, load, 8, 8),
        lambda load: closed_loop(model, rules, load, 8),
    ):
        none, half, short = map(seen, (Workload(4000, 100), Workload(4000, 100, 2000), Workload(2000, 100)))
        lengths = ((short, 2000), (half, 4000), (none, 4000))
        in_steps = [each.ttft_s - model.cluster.outside_s(length) for each, length in lengths]
        assert in_steps[0] < in_steps[1] < 0.75 * in_steps[2]
        assert short.itl_s < half.itl_s < none.itl_s
    tight = replace(rules, capacity_tokens=5000)
    alone = closed_loop(model, tight, Workload(4000, 100, 2000), 2)
    assert alone.ttft_s > closed_loop(model, rules, Workload(4000, 100, 2000), 2).ttft_s  # one at a time


def test_accepted_drafts_save_steps_and_all_drafts_cost_their_products(model: CostModel) -> None:
    rules = StepRules(2048, 256, model.kv_capacity_tokens(2048, 256))
    for batch in (1, 4):
        none, half, refused = (
            spread_out(model, rules, load, batch, batch)
            for load in (Workload(500, 200), Workload(500, 200, 0, 4, 2.0), Workload(500, 200, 0, 4, 0.0))
        )
        assert 0.3 < half.itl_s / none.itl_s < 0.5 and refused.itl_s > none.itl_s
    many = [closed_loop(model, rules, Workload(50, 50, 0, drafted, 0.0), 200) for drafted in (0, 8)]
    assert many[1].itl_s > 2 * many[0].itl_s  # products of 1800 rows in place of 200
