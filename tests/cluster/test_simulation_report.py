"""The report of a simulation, against hand-worked figures and Python's own percentiles."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.hardware import parse_gpus
from cluster.planning.cost_model import CostModel, StepShape
from cluster.planning.official import find_config
from cluster.simulation.arrivals import Request
from cluster.simulation.autoscaler import AutoscalingConfig
from cluster.simulation.replica import ReplicaConfig
from cluster.simulation.report import Limits, plot_replicas, summarize
from cluster.simulation.service import Outcome, ServiceSimulation, simulate
from cluster.simulation.step_times import StepTimes
from qwen3_dist.errors import ConfigError
from qwen3_dist.layout import Layout
from qwen3_dist.percentiles import percentiles, weighted_percentiles
from qwen3_dist.protocol.step_limits import SchedulerLimits


class PromptsTakeLonger:
    """0.1 s for a decode step, a second more for 100 prompt tokens."""

    def step_seconds(self, shape: StepShape) -> float:
        return 0.1 + 0.01 * shape.prefill_tokens


def outcome() -> Outcome:
    """Two requests that do not meet, of 1.1 s to the first token and 0.1 s a token, and one refused."""
    replica = ReplicaConfig(64, SchedulerLimits(8, 512), depth=1, num_devices=4)
    simulation = ServiceSimulation(replica, AutoscalingConfig(2, 2))
    requests = [Request(0.0, 100, 10), Request(1.0, 2000, 1), Request(8.0, 200, 1)]
    return simulate(simulation, PromptsTakeLonger(), requests)


def test_a_report_counts_what_happened() -> None:
    report = summarize(outcome(), Limits(ttft_ms=1500, itl_ms=90))
    # first: tokens at 1.1, 1.2 ... 2.0; third: 8.0 + 0.1 + 2.0
    assert report["span_s"] == 10.1
    assert (report["requests"], report["refused"]) == (3, 1)
    assert report["output_tokens_per_s"] == pytest.approx(11 / 10.1, abs=1e-3)
    assert report["input_tokens_per_s"] == pytest.approx(300 / 10.1, abs=1e-3)
    assert report["ttft_ms"] == {"mean": 1600.0, "p50": 1600.0, "p90": 2000.0, "p99": 2090.0}
    assert report["itl_ms"] == {"p50": 100.0, "p90": 100.0, "p99": 100.0}
    assert report["tpot_ms"] == {"p50": 100.0, "p90": 100.0, "p99": 100.0}
    # TTFT: the first holds 1500; ITL: the third has a single token, so nothing to wait for
    assert report["slo"]["ttft_attained"] == pytest.approx(1 / 3, abs=1e-4)
    assert report["slo"]["itl_attained"] == pytest.approx(1 / 3, abs=1e-4)
    assert report["slo"]["attained"] == 0
    assert report["replicas"]["gpu_hours"] == pytest.approx(2 * 4 * 10.1 / 3600, abs=1e-4)
    assert report["replicas"]["over_time"] == [[0.0, 2, 0, 0]]
    assert report["simulation"]["devices"] == 8
    assert report["simulation"]["steps"] == 11


def test_without_limits_nothing_is_said_about_them() -> None:
    slo = summarize(outcome(), Limits())["slo"]
    assert set(slo.values()) == {None}


def test_limits_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="ttft_ms must be positive, not 0"):
        Limits(ttft_ms=0)


@given(st.lists(st.integers(1, 30), min_size=2, max_size=200))
def test_percentiles_are_pythons_inclusive_ones_weighted_or_not(values: list[int]) -> None:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    expected = {f"p{percent}": pytest.approx(cuts[percent - 1], abs=2e-3) for percent in (50, 90, 99)}
    assert percentiles([float(value) for value in values]) == expected
    assert weighted_percentiles({value: values.count(value) for value in values}, 1.0) == expected


def test_percentiles_of_one_value_are_that_value_and_of_none_nothing() -> None:
    assert percentiles([4.0]) == {"p50": 4.0, "p90": 4.0, "p99": 4.0}
    assert percentiles([]) is None
    assert weighted_percentiles({}, 1.0) is None


def test_decode_times_between_the_models_points_lie_on_a_line() -> None:
    class Bent:
        calls = 0

        def step_seconds(self, shape: StepShape) -> float:
            self.calls += 1
            return max(1.0, 0.01 * shape.decode_context_tokens)

    cost = Bent()
    times = StepTimes(cost)
    # four sequences: points lie 128 tokens apart; 0.01 * 128 = 1.28 at the first, and between it and the next
    # the model itself is a line
    assert times.seconds(StepShape(4, 128, 0, 0, 4)) == pytest.approx(1.28)
    assert times.seconds(StepShape(4, 200, 0, 0, 4)) == pytest.approx(2.0)
    assert times.seconds(StepShape(4, 64, 0, 0, 4)) == pytest.approx((1.0 + 1.28) / 2)
    calls = cost.calls
    assert times.seconds(StepShape(4, 255, 0, 0, 4)) == pytest.approx(2.55)
    assert cost.calls == calls
    assert times.seconds(StepShape(4, 255, 10, 0, 4)) == pytest.approx(2.55)
    assert cost.calls == calls + 1


def test_experts_shared_by_all_groups_get_the_tokens_that_there_are() -> None:
    _, config = find_config("Qwen3-30B-A3B")
    cost = CostModel(config, Layout(dp=8, ep=8), parse_gpus("8xH100"))
    times = StepTimes(cost)
    prompt, decode = StepShape(0, 0, 2000, 2001000, 1), StepShape(4, 4000, 0, 0, 4)
    alike = times.together([prompt] * 8, groups=8)
    assert alike == pytest.approx(cost.step_seconds(prompt))
    alone = times.together([prompt] + [decode] * 7, groups=8)
    # 2,000 tokens and not 16,000 meet the experts; the rest of the step is that of the group with the prompt
    parts = cost.step_parts(prompt)
    assert alike - parts["experts"] < alone < alike - 0.5 * parts["experts"]
    # and decodes alone are as slow as the largest batch
    few = StepShape(2, 2000, 0, 0, 2)
    assert times.together([decode, few], groups=8) == times.seconds(decode)


def test_replicas_over_time_can_be_drawn(tmp_path: Path) -> None:
    plot_replicas(tmp_path / "replicas.png", "two replicas", outcome())
    assert (tmp_path / "replicas.png").read_bytes().startswith(b"\x89PNG")
