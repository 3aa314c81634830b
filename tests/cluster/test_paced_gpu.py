"""What `python -m benchmarks.simulator --http` rests on, beside the service."""

from __future__ import annotations

import pytest

from benchmarks.simulator.http_loop import group_size
from benchmarks.simulator.http_run import GivenLoop
from benchmarks.simulator.http_scaling import changes, replicas_compared, start_ups
from benchmarks.simulator.paced_gpu import modelled, simulated_replica
from cluster.planning.cost_model import StepShape
from cluster.simulation.arrivals import Request
from cluster.simulation.service import ReplicaCount, ServiceSimulation, simulate


@pytest.mark.parametrize("shape", [StepShape(1, 500, 0, 0, 1), StepShape(32, 9000, 700, 245350, 34)])
def test_a_slowed_gpu_takes_as_many_times_as_long_for_every_step(shape: StepShape) -> None:
    assert modelled(8.0).step_seconds(shape) == pytest.approx(8 * modelled(1.0).step_seconds(shape))


def test_a_loop_of_given_requests_sends_all_of_them_in_order() -> None:
    given = [Request(0.0, 100 + number, 3) for number in range(7)]
    outcome = simulate(ServiceSimulation(simulated_replica()), modelled(1.0), GivenLoop(2, given))
    assert sorted(outcome.recorder.input_lens) == [each.input_len for each in given]


def test_first_tokens_that_are_close_to_each_other_are_of_one_step() -> None:
    assert group_size([0.0, 0.02, 0.04, 1.0], 0.024) == (3 * 3 + 1) / 4


def test_start_ups_and_mean_replicas_follow_from_counts() -> None:
    real = [
        ReplicaCount(*each) for each in ((0, 1, 0, 0), (1, 1, 0, 0), (2, 1, 2, 0), (5, 2, 1, 0), (7, 3, 0, 0))
    ]
    assert start_ups(real) == [3, 5]
    assert [count.time_s for count in changes(real)] == [0, 2, 5, 7]
    simulated = [ReplicaCount(0, 1, 0, 0), ReplicaCount(5, 3, 0, 0)]
    found = replicas_compared(real, simulated, 10.0)
    assert found == {"mean_replicas": 1.8, "simulated_mean_replicas": 1.111, "mean_difference": 0.111}
