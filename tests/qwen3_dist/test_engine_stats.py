"""What an engine counts of its steps: tokens, traffic between ranks, and how long ranks had nothing to run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from qwen3_dist.config import ModelConfig
from qwen3_dist.engine import step_meter
from qwen3_dist.engine.engine import Engine
from qwen3_dist.engine.step_meter import StepMeter
from qwen3_dist.engine.step_traffic import StepTraffic, Traffic
from qwen3_dist.protocol.outputs import TokenDelta
from qwen3_dist.protocol.step_plan import StepPlan
from qwen3_dist.sampling_params import SamplingParams
from qwen3_dist.settings import EngineConfig
from tests.checkpoints import DENSE, MOE

DENSE_CONFIG = ModelConfig.from_dict({**DENSE, "model_type": "qwen3"})
MOE_CONFIG = ModelConfig.from_dict({**DENSE, **MOE, "model_type": "qwen3_moe"})


def traffic_of(config: ModelConfig, tokens: int, device: str = "cpu", **settings: object) -> Traffic:
    traffic = StepTraffic(EngineConfig(dtype="float32", **settings), config, device)  # type: ignore[arg-type]
    traffic.add(tokens)
    return traffic.total


def test_one_rank_sends_nothing() -> None:
    assert traffic_of(DENSE_CONFIG, 10) == Traffic()
    alone = traffic_of(MOE_CONFIG, 10)
    assert (alone.tensor_bytes, alone.expert_bytes, alone.pipeline_bytes) == (0, 0, 0)


def test_a_dense_model_reduces_its_embedding_and_twice_a_layer() -> None:
    row = 4 * DENSE_CONFIG.emb_dim
    reduces = 1 + 2 * DENSE_CONFIG.n_layers
    assert traffic_of(DENSE_CONFIG, 10, layout="tp=2").tensor_bytes == 10 * reduces * 2 * row
    assert traffic_of(DENSE_CONFIG, 10, layout="tp=4").tensor_bytes == 10 * reduces * 6 * row


def test_each_stage_sends_its_rows_to_the_next_from_each_tp_rank() -> None:
    assert (
        traffic_of(DENSE_CONFIG, 10, layout="tp=2,pp=2").pipeline_bytes == 10 * 2 * 4 * DENSE_CONFIG.emb_dim
    )


def test_by_all_gather_every_rank_gets_the_tokens_of_all_groups() -> None:
    row, moe = 4 * MOE_CONFIG.emb_dim, sum(map(MOE_CONFIG.is_moe_layer, range(MOE_CONFIG.n_layers)))
    sent = traffic_of(MOE_CONFIG, 6, layout="tp=2,dp=2,ep=4", moe_dispatch="all_gather")
    # An all-reduce over tp=2, then an all-gather and a reduce-scatter with the one other group on each of 2 tp ranks.
    assert sent.expert_bytes == moe * 6 * (2 + 2 * 2) * row
    assert sent.dispatched_tokens == moe * 6 * MOE_CONFIG.num_experts_per_tok


def test_by_all_to_all_a_token_travels_to_the_ranks_of_its_experts_and_back() -> None:
    config = dataclasses.replace(
        MOE_CONFIG, num_experts=4, num_experts_per_tok=4
    )  # every rank has some of them
    row, moe = 4 * config.emb_dim, sum(map(config.is_moe_layer, range(config.n_layers)))
    sent = traffic_of(config, 6, layout="dp=2,ep=2", moe_dispatch="all_to_all")
    assert sent.expert_bytes == moe * 6 * (2 * row + 4 * 8)


class Clock:
    """A monotonic clock that tests set."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(step_meter, "time", clock)
    yield clock


def test_ranks_wait_for_requests_until_work_comes_and_for_the_engine_from_then_on(clock: Clock) -> None:
    meter = StepMeter(StepTraffic(EngineConfig(), DENSE_CONFIG, "cpu"), 4.0)
    plans = [StepPlan(1, (), (7,), False)]
    clock.now = 110.0
    meter.work_came()
    clock.now = 111.0
    meter.submitted(plans, alone=True)
    clock.now = 112.0
    meter.submitted(plans, alone=False)  # the ranks have the first
    assert meter.step_age_s == 1.0
    clock.now = 115.0
    meter.collected(others=True)
    assert meter.step_age_s == 0.0
    clock.now = 118.0
    assert meter.step_age_s == 3.0
    meter.collected(others=False)
    clock.now = 118.5
    assert meter.step_age_s == 0.0
    meter.submitted(plans, alone=True)
    assert (meter.wait_for_requests_s, meter.wait_for_engine_s) == (10.0, 1.5)
    assert (meter.computed_tokens, meter.last_tokens) == (21, 7)


def test_an_engine_counts_tokens_and_tells_when_each_choice_was_scheduled() -> None:
    engine = Engine(EngineConfig(device="cpu", dtype="float32", num_blocks=64))
    try:
        engine.add_request("a", [5, 6, 7], SamplingParams(temperature=0, max_tokens=4, n=2, ignore_eos=True))
        deltas: list[TokenDelta] = []
        while engine.has_work:
            deltas += engine.step().get("a", [])
        stats = engine.stats()
        assert stats.prompt_tokens == 6
        assert stats.generation_tokens == sum(len(delta.token_ids) for delta in deltas) == 8
        # The prompts and all sampled tokens but the last of each choice.
        assert stats.computed_tokens == 6 + 2 * 3 - stats.cached_prompt_tokens
        assert stats.kv_usage == 0.0 and engine.step_age_s == 0.0
        for index in range(2):
            times = [delta.step_s for delta in deltas if delta.index == index]
            [scheduled] = {delta.scheduled_s for delta in deltas if delta.index == index}
            assert 0 < scheduled < times[0] and times == sorted(set(times))
    finally:
        engine.shutdown()


def test_a_step_that_runs_far_longer_than_recent_ones_has_stalled(clock: Clock) -> None:
    meter = StepMeter(StepTraffic(EngineConfig(), DENSE_CONFIG, "cpu"), 4.0)

    def run(seconds: float) -> str:
        meter.submitted([StepPlan(1, (), (7,), False)], alone=True)
        clock.now += seconds
        said = meter.stalled()
        meter.collected(others=False)
        return said

    assert run(60.0) == ""  # nothing is known yet of how long steps take
    for _ in range(3000):
        assert run(0.02) == ""
    assert run(3.9) == ""
    assert "a step has run for 100.0 s" in run(100.0)
    assert meter.stalled() == ""  # it has ended after all


def test_only_steps_longer_than_a_turn_of_the_gil_let_other_threads_in(clock: Clock) -> None:
    meter = StepMeter(StepTraffic(EngineConfig(), DENSE_CONFIG, "cpu"), 4.0)
    plans = [StepPlan(1, (), (7,), False)]

    def run(seconds: float, others: bool) -> bool:
        meter.submitted(plans, alone=meter.step_age_s == 0.0)
        clock.now += seconds
        meter.collected(others)
        return meter.in_long_step

    meter.submitted(plans, alone=True)
    assert not meter.in_long_step
    assert run(0.02, others=True) and not run(0.002, others=True) and not run(0.02, others=False)
