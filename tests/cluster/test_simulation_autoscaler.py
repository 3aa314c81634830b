"""Replicas come and go by Ray Serve's rule: hand-worked counts, and Serve's own policy beside ours."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.serve import autoscaling_policy as serve_policy
from ray.serve.config import AutoscalingConfig as ServeConfig

from cluster.planning.cost_model import StepShape
from cluster.simulation.arrivals import Lengths, PoissonArrivals, Request
from cluster.simulation.autoscaler import Autoscaler, AutoscalingConfig, MeanLoad
from cluster.simulation.replica import ReplicaConfig
from cluster.simulation.service import Outcome, ReplicaCount, ServiceSimulation, simulate
from qwen3_dist.errors import ConfigError
from qwen3_dist.protocol.step_limits import SchedulerLimits


class OneSecond:
    def step_seconds(self, shape: StepShape) -> float:
        return 1.0


class TenthOfASecond:
    def step_seconds(self, shape: StepShape) -> float:
        return 0.1 + 1e-5 * shape.decode_context_tokens + 1e-3 * shape.prefill_tokens


def test_more_replicas_are_wanted_once_the_load_has_been_high_for_the_delay() -> None:
    scaler = Autoscaler(AutoscalingConfig(1, 10, target_ongoing_requests=4, upscale_delay_s=10))
    loads = [(2, 4), (4, 5), (6, 9), (8, 9), (10, 17), (12, 17), (14, 17)]
    # the wish for more begins at 4; at 14 it is ten seconds old, and 17 / 4 makes 5
    assert [scaler.decide(now, 1, load) for now, load in loads] == [1, 1, 1, 1, 1, 1, 5]


def test_a_load_that_drops_in_between_starts_the_delay_anew() -> None:
    scaler = Autoscaler(AutoscalingConfig(1, 10, target_ongoing_requests=4, upscale_delay_s=4))
    loads = [(2, 8), (4, 4), (6, 8), (8, 8), (10, 8)]
    assert [scaler.decide(now, 1, load) for now, load in loads] == [1, 1, 1, 1, 2]


def test_fewer_replicas_after_the_downscale_delay_and_never_below_the_least() -> None:
    config = AutoscalingConfig(2, 5, target_ongoing_requests=4, upscale_delay_s=0, downscale_delay_s=6)
    scaler = Autoscaler(config)
    assert scaler.decide(2, 2, 100) == 5  # at most the most
    loads = [(4, 9), (6, 9), (8, 9), (10, 9), (12, 0), (14, 0), (16, 0), (18, 0), (20, 0)]
    # 9 / 4 makes 3, from 4 on; at 12 nothing is left, and two stay
    assert [scaler.decide(now, 5, load) for now, load in loads] == [5, 5, 5, 3, 3, 3, 3, 2, 2]


@settings(max_examples=150, deadline=None)
@given(
    readings=st.lists(st.tuples(st.floats(0, 90), st.integers(1, 6)), min_size=1, max_size=40),
    target=st.sampled_from([1.0, 3.0, 7.5]),
    up=st.sampled_from([0.0, 2.0, 5.0]),
    down=st.sampled_from([0.0, 3.0, 8.0]),
)
def test_decisions_are_those_of_serves_own_policy(
    readings: list[tuple[float, int]], target: float, up: float, down: float
) -> None:
    ours = Autoscaler(AutoscalingConfig(1, 8, target, up, down))
    config = ServeConfig(
        min_replicas=1,
        max_replicas=8,
        target_ongoing_requests=target,
        upscale_delay_s=up,
        downscale_delay_s=down,
    )
    theirs, state = 1, {}
    for number, (load, running) in enumerate(readings):
        now = 2.0 * number
        context: Any = SimpleNamespace(
            current_num_replicas=running, total_num_requests=load, config=config, target_num_replicas=theirs
        )
        wanted, _ = serve_policy.replica_queue_length_autoscaling_policy(context)
        wanted = serve_policy._apply_scaling_factors(wanted, running, config)
        decided, state = serve_policy._apply_delay_logic(max(0, wanted), theirs, config, state, now)
        theirs = max(1, min(8, decided))
        assert ours.decide(now, running, load) == theirs


def test_the_load_is_its_mean_over_the_look_back_period() -> None:
    load = MeanLoad(look_back_s=4)
    load.set(1.0, 6)
    assert load.mean(2.0) == pytest.approx(3)  # 0 for a second, 6 for a second
    load.set(3.0, 2)
    assert load.mean(4.0) == pytest.approx((6 * 2 + 2 * 1) / 4)
    assert load.mean(6.0) == pytest.approx((6 * 1 + 2 * 3) / 4)
    assert load.mean(8.0) == pytest.approx(2)


def scaled(**changes: Any) -> Outcome:
    """Ten requests at 0, then one at a time: 20 output tokens of a second each."""
    config = AutoscalingConfig(
        **{
            "min_replicas": 1,
            "max_replicas": 3,
            "target_ongoing_requests": 4.0,
            "upscale_delay_s": 4.0,
            "downscale_delay_s": 6.0,
            "metrics_interval_s": 2.0,
            "look_back_period_s": 2.0,
        }
        | changes.pop("autoscaling", {})
    )
    replica = ReplicaConfig(64, SchedulerLimits(16, 512), depth=1, num_devices=2)
    requests = [Request(0.0, 10, 20) for _ in range(10)] + [Request(30.0, 10, 20)]
    return simulate(ServiceSimulation(replica, config, start_up_s=5.0, **changes), OneSecond(), requests)


def test_replicas_start_when_load_is_high_and_go_when_it_has_been_low() -> None:
    outcome = scaled()
    # read every 2 s: from 2 on 10 / 4 wants 3; decided at 6, taking requests at 11. All ten end at 20 (one
    # step of prompts, 19 decodes). From 22 on 0 or 1 are ongoing and 1 is wanted; decided at 28.
    assert outcome.replica_counts == [
        ReplicaCount(0.0, 1, 0, 0),
        ReplicaCount(6.0, 1, 2, 0),
        ReplicaCount(11.0, 3, 0, 0),
        ReplicaCount(28.0, 1, 0, 0),
    ]
    assert outcome.end_s == pytest.approx(50)


def test_a_replica_that_is_to_go_finishes_its_requests_first() -> None:
    config = AutoscalingConfig(
        1, 2, 4.0, upscale_delay_s=0.0, downscale_delay_s=0.0, metrics_interval_s=2.0, look_back_period_s=2.0
    )
    replica = ReplicaConfig(64, SchedulerLimits(16, 512), depth=1)
    early = [Request(0.0, 10, 4) for _ in range(8)]
    late = [Request(3.5, 10, 40) for _ in range(4)]
    outcome = simulate(ServiceSimulation(replica, config, start_up_s=1.0), OneSecond(), early + late)
    # 8 / 4 wants two replicas at 2; the second is there at 3 and, with nothing to do, gets the four:
    # one at once, the others from 4.5 on. From 5 on they are all there is, so at 8 one replica is enough, and
    # the newer one goes when the last of them has its forty tokens.
    assert outcome.replica_counts == [
        ReplicaCount(0.0, 1, 0, 0),
        ReplicaCount(2.0, 1, 1, 0),
        ReplicaCount(3.0, 2, 0, 0),
        ReplicaCount(8.0, 1, 0, 1),
        ReplicaCount(44.5, 1, 0, 0),
    ]
    assert len(outcome.recorder.arrivals_s) == 12


def test_no_more_devices_are_held_than_there_are_while_replicas_drain() -> None:
    outcome = scaled(max_devices=6)
    assert max(count.total for count in outcome.replica_counts) == 3


def test_skipping_ahead_changes_nothing_where_replicas_come_and_go() -> None:
    config = AutoscalingConfig(1, 4, 3.0, 1.0, 3.0, metrics_interval_s=1.0, look_back_period_s=2.0)
    arrivals = PoissonArrivals((1.0, 6.0, 0.5), 90.0, Lengths(60, 0.5), Lengths(30, 0.8), seed=4)
    outcomes = []
    for fast_forward in (True, False):
        replica = ReplicaConfig(48, SchedulerLimits(6, 64), depth=2, num_devices=2, fast_forward=fast_forward)
        simulation = ServiceSimulation(replica, config, start_up_s=4.0, max_devices=8)
        outcomes.append(simulate(simulation, TenthOfASecond(), arrivals))
    fast, slow = outcomes
    assert fast.replica_counts == slow.replica_counts
    assert fast.recorder.last_tokens_s == slow.recorder.last_tokens_s
    assert fast.recorder.first_tokens_s == slow.recorder.first_tokens_s
    assert fast.counts == slow.counts
    assert max(count.running for count in fast.replica_counts) == 4
    assert any(count.draining for count in fast.replica_counts)
    assert fast.events < slow.events


def test_a_fixed_number_of_replicas_is_never_read_or_changed() -> None:
    outcome = scaled(autoscaling={"min_replicas": 3})
    assert outcome.replica_counts == [ReplicaCount(0.0, 3, 0, 0)]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"min_replicas": 4}, "min_replicas=4 must lie between 1 and max_replicas=3"),
        ({"target_ongoing_requests": 0.0}, "target_ongoing_requests must be positive, not 0"),
        ({"upscale_delay_s": -1.0}, "upscale_delay_s must not be negative, not -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        scaled(autoscaling=changes)
