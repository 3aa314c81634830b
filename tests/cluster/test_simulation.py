"""The simulated service: hand-worked times, nothing lost, and skipping ahead changes nothing.

`Linear` is a cost model whose sums can be done by hand: 1 s a step, 0.1 s a decode, 0.01 s a prompt token.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.planning.cost_model import StepShape
from cluster.simulation.arrivals import ClosedLoop, Lengths, PoissonArrivals, Request
from cluster.simulation.autoscaler import AutoscalingConfig
from cluster.simulation.group import make_sequence
from cluster.simulation.recorder import Recorder
from cluster.simulation.replica import Replica, ReplicaConfig
from cluster.simulation.service import Outcome, ServiceSimulation, simulate
from cluster.simulation.step_times import StepTimes
from qwen3_dist.engine.block_manager import BlockManager
from qwen3_dist.errors import ConfigError
from qwen3_dist.protocol.step_limits import SchedulerLimits


class Linear:
    def step_seconds(self, shape: StepShape) -> float:
        return 1 + 0.1 * shape.num_decodes + 0.01 * shape.prefill_tokens


class Bent:
    """A step's time depends on everything in its shape, and on the context not evenly."""

    def step_seconds(self, shape: StepShape) -> float:
        attention = max(3e-5 * shape.decode_context_tokens, 1e-3)
        return (
            0.02
            + attention
            + 1e-3 * shape.num_decodes
            + 2e-4 * shape.prefill_tokens
            + 1e-7 * shape.prefill_pairs
        )


def replica_config(**changes: object) -> ReplicaConfig:
    base = ReplicaConfig(num_blocks=64, limits=SchedulerLimits(8, 64), block_size=16, depth=1)
    return replace(base, **changes)  # type: ignore[arg-type]


def service(replicas: int = 1, **changes: object) -> ServiceSimulation:
    return ServiceSimulation(replica_config(**changes), AutoscalingConfig(replicas, replicas))


def times(outcome: Outcome) -> list[tuple[float, float, float]]:
    """(arrival, first token, last token) of each request, by arrival."""
    recorder = outcome.recorder
    return sorted(zip(recorder.arrivals_s, recorder.first_tokens_s, recorder.last_tokens_s, strict=True))


def history(outcome: Outcome) -> tuple[object, ...]:
    """All that one simulation gives, but for the wall time and how many events it took."""
    recorder = outcome.recorder
    return (
        list(zip(recorder.arrivals_s, recorder.first_tokens_s, recorder.last_tokens_s, strict=True)),
        list(zip(recorder.input_lens, recorder.output_lens, strict=True)),
        dict(recorder.itl_us),
        outcome.counts,
        outcome.steps,
        outcome.end_s,
        outcome.replica_counts,
    )


def approx(*expected: tuple[float, ...]) -> list[object]:
    return [pytest.approx(one) for one in expected]


@pytest.mark.parametrize("fast_forward", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_one_request_waits_for_its_prefill_and_then_for_one_decode_step_a_token(
    depth: int, fast_forward: bool
) -> None:
    outcome = simulate(service(depth=depth, fast_forward=fast_forward), Linear(), [Request(5.0, 50, 4)])
    # prefill 1 + 50 * 0.01 = 1.5 s; each of three decodes 1 + 0.1 = 1.1 s
    assert times(outcome) == approx((5.0, 6.5, 9.8))
    assert outcome.recorder.itl_us == {1_100_000: 3}
    assert outcome.steps == 4
    assert outcome.end_s == pytest.approx(9.8)


def test_a_prompt_longer_than_the_budget_takes_several_steps() -> None:
    outcome = simulate(service(), Linear(), [Request(0.0, 100, 1)])
    # chunks of 64 and 36: 1.64 + 1.36
    assert times(outcome) == approx((0.0, 3.0, 3.0))


def test_an_arrival_joins_when_the_step_in_progress_ends() -> None:
    outcome = simulate(service(), Linear(), [Request(0.0, 50, 3), Request(2.0, 20, 1)])
    # 0.0-1.5 first prefill | 1.5-2.6 its decode | 2.6-3.9 its last decode with the prompt of 20
    assert times(outcome) == approx((0.0, 1.5, 3.9), (2.0, 3.9, 3.9))
    assert outcome.recorder.itl_us == {1_100_000: 1, 1_300_000: 1}


def test_with_steps_planned_ahead_an_arrival_joins_one_step_later() -> None:
    outcome = simulate(service(depth=2), Linear(), [Request(0.0, 50, 4), Request(2.0, 20, 1)])
    # 0.0-1.5 prefill | 1.5-2.6 decode | 2.6-3.7 decode, planned at 1.5 | 3.7-5.0 last decode with the prompt
    assert times(outcome) == approx((0.0, 1.5, 5.0), (2.0, 5.0, 5.0))


def test_groups_of_a_replica_step_together_and_as_long_as_the_slowest() -> None:
    outcome = simulate(service(groups=2), Linear(), [Request(0.0, 50, 3), Request(0.1, 20, 3)])
    # 0.0-1.5 first prefill, the other group idle | 1.5-2.7 the second's prefill of 20 (1.2 s) beside the
    # first's decode (1.1 s) | 2.7-3.8 a decode in both | 3.8-4.9 the second's last
    assert times(outcome) == approx((0.0, 1.5, 3.8), (0.1, 2.7, 4.9))


def test_a_request_goes_to_the_group_with_the_fewest_tokens() -> None:
    recorder = Recorder()
    replica = Replica(0, replica_config(groups=3), StepTimes(Linear()), recorder)
    for length in (30, 20, 10, 5, 5, 20):
        replica.submit(Request(0.0, length, 1), 0.0)
    while replica.next_event_s is not None:
        now = replica.next_event_s
        replica.finish_step(now)
        replica.proceed(now)
        if len(recorder.arrivals_s) == 1:
            # the first request ran alone; the others came in behind it, groups being empty again
            assert [group.num_tokens for group in replica.groups] == [20, 30, 10]
    assert len(recorder.arrivals_s) == 6


def test_shared_prefixes_are_found_in_the_cache() -> None:
    requests = [
        Request(0.0, 40, 1, prefix_id=7, prefix_len=32),
        Request(9.0, 40, 1, prefix_id=7, prefix_len=32),
    ]
    other = [Request(20.0, 40, 1, prefix_id=8, prefix_len=32)]
    outcome = simulate(service(), Linear(), requests + other)
    assert (outcome.counts.prompt_tokens, outcome.counts.cached_prompt_tokens) == (120, 32)
    # the second computes 8 of its 40 tokens
    assert times(outcome) == approx((0.0, 1.4, 1.4), (9.0, 10.08, 10.08), (20.0, 21.4, 21.4))


def test_hashes_stand_for_the_tokens_that_prompts_share() -> None:
    """What the block manager finds by our hashes is what it finds by hashing real tokens."""
    lengths = [(40, 32), (64, 32), (20, 20), (64, 16), (33, 33)]
    found: list[list[int]] = []
    for real in (False, True):
        blocks = BlockManager(64, 16)
        cached = []
        for seq_id, (input_len, prefix_len) in enumerate(lengths):
            sequence = make_sequence(seq_id, Request(0.0, input_len, 8, 5, prefix_len), 16, 1024)
            if real:
                sequence.token_ids = [5] * prefix_len + [100 + seq_id] * (input_len - prefix_len)
                sequence.block_hashes = []
            assert blocks.admit(sequence, 0)
            cached.append(sequence.num_computed)
            assert blocks.reserve(sequence, input_len - sequence.num_computed)
            sequence.num_computed = input_len
            blocks.register(sequence)
        found.append(cached)
    assert found[0] == found[1] == [0, 32, 16, 16, 32]


def test_a_prompt_that_cannot_fit_is_refused_and_the_others_run() -> None:
    requests = [Request(0.0, 64 * 16, 1), Request(1.0, 10, 2)]
    outcome = simulate(service(), Linear(), requests)
    assert outcome.refused == 1
    assert times(outcome) == approx((1.0, 2.1, 3.2))


def test_output_ends_where_the_context_does() -> None:
    outcome = simulate(service(max_model_len=60), Linear(), [Request(0.0, 50, 1000)])
    assert list(outcome.recorder.output_lens) == [10]


def test_of_two_replicas_the_one_with_fewer_requests_is_chosen() -> None:
    requests = [Request(0.1 * i, 50, 1) for i in range(4)]
    outcome = simulate(service(replicas=2), Linear(), requests)
    # two each: the first of each runs alone, the second when it has ended
    assert sorted(first for _, first, _ in times(outcome)) == pytest.approx([1.5, 1.6, 3.0, 3.1])


workloads = st.lists(
    st.tuples(
        st.floats(0, 3),
        st.integers(1, 150),
        st.integers(1, 90),
        st.integers(0, 2),
        st.sampled_from([0, 0, 16, 37, 64]),
    ),
    min_size=1,
    max_size=14,
)


def requests_of(rows: list[tuple[float, int, int, int, int]]) -> list[Request]:
    now, requests = 0.0, []
    for gap, input_len, output_len, prefix_id, prefix_len in rows:
        now += gap
        requests.append(Request(now, input_len, output_len, prefix_id, min(prefix_len, input_len)))
    return requests


@settings(max_examples=60, deadline=None)
@given(
    rows=workloads,
    depth=st.integers(1, 3),
    groups=st.integers(1, 3),
    num_blocks=st.integers(16, 50),
    seqs=st.integers(1, 6),
    caching=st.booleans(),
    replicas=st.integers(1, 2),
)
def test_skipping_ahead_gives_exactly_what_single_steps_give(
    rows: list[tuple[float, int, int, int, int]],
    depth: int,
    groups: int,
    num_blocks: int,
    seqs: int,
    caching: bool,
    replicas: int,
) -> None:
    """With few blocks, so that sequences wait and are preempted."""
    outcomes = [
        simulate(
            service(
                replicas,
                depth=depth,
                groups=groups,
                num_blocks=num_blocks,
                limits=SchedulerLimits(seqs, 48),
                prefix_caching=caching,
                fast_forward=fast_forward,
            ),
            Bent(),
            requests_of(rows),
        )
        for fast_forward in (True, False)
    ]
    assert history(outcomes[0]) == history(outcomes[1])
    assert outcomes[0].events <= outcomes[1].events


def test_the_comparison_above_meets_preemptions_and_long_stretches() -> None:
    requests = [Request(0.3 * i, 100, 80) for i in range(12)]
    fast, slow = (
        simulate(service(num_blocks=40, depth=2, fast_forward=on), Bent(), requests) for on in (True, False)
    )
    assert fast.counts.preemptions > 5
    assert fast.events < slow.events / 2
    assert history(fast) == history(slow)


@settings(max_examples=30, deadline=None)
@given(rows=workloads, depth=st.integers(1, 2), groups=st.integers(1, 2))
def test_every_request_ends_exactly_once_and_all_blocks_are_free_at_the_end(
    rows: list[tuple[float, int, int, int, int]], depth: int, groups: int
) -> None:
    requests = requests_of(rows)
    recorder = Recorder()
    replica = Replica(0, replica_config(depth=depth, groups=groups), StepTimes(Bent()), recorder)
    waiting = list(requests)
    while waiting or replica.next_event_s is not None:
        if waiting and (replica.next_event_s is None or waiting[0].arrival_s <= replica.next_event_s):
            request = waiting.pop(0)
            replica.submit(request, request.arrival_s)
        else:
            assert replica.next_event_s is not None
            now = replica.next_event_s
            replica.finish_step(now)
            replica.proceed(now)
        for group in replica.groups:
            group.check_integrity()
    assert replica.ongoing == 0
    ended = Counter(zip(recorder.arrivals_s, recorder.input_lens, recorder.output_lens, strict=True))
    assert ended == Counter((r.arrival_s, r.input_len, r.output_len) for r in requests)
    for group in replica.groups:
        assert group.scheduler.blocks.num_free == group.scheduler.blocks.num_blocks
    for arrival, first, last in zip(
        recorder.arrivals_s, recorder.first_tokens_s, recorder.last_tokens_s, strict=True
    ):
        assert arrival < first <= last
    tokens = sum(r.output_len for r in requests)
    assert sum(recorder.itl_us.values()) == tokens - len(requests)


def test_a_client_of_a_closed_loop_sends_its_next_request_when_its_last_is_answered() -> None:
    outcome = simulate(service(), Linear(), ClosedLoop(2, 4, Lengths(10), Lengths(1)))
    expected = [(0.0, 1.1, 1.1), (0.0, 2.2, 2.2), (1.1, 3.3, 3.3), (2.2, 4.4, 4.4)]
    assert times(outcome) == [pytest.approx(each) for each in expected]


def test_in_a_closed_loop_the_overhead_lies_between_an_answer_and_the_next_request() -> None:
    clients = ClosedLoop(1, 200, Lengths(10), Lengths(1))
    outcome = simulate(replace(service(), request_overhead_s=0.5), Linear(), clients)
    ended = times(outcome)
    turnarounds = [after[0] - before[2] for before, after in pairwise(ended)]
    assert len(ended) == 200 and min(turnarounds) >= 0 and max(turnarounds) <= 1
    assert fmean(turnarounds) == pytest.approx(0.5, rel=0.15)


def test_the_same_seed_gives_the_same_history_and_another_seed_another() -> None:
    def run(seed: int) -> tuple[object, ...]:
        arrivals = PoissonArrivals((2.0,), 30.0, Lengths(60, 0.5), Lengths(20, 1.0), 16, 3, seed)
        return history(simulate(replace(service(replicas=3), seed=seed), Bent(), arrivals))

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_more_devices_than_there_are_is_refused_with_the_most_that_fit() -> None:
    with pytest.raises(ConfigError, match="max_replicas=5 of 8 devices each need 40 and there are 32.*=4 is"):
        ServiceSimulation(replica_config(num_devices=8), AutoscalingConfig(1, 5), max_devices=32)
