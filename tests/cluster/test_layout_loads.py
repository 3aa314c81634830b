"""One layout at growing loads, and the steady state that a rate of arrivals comes to."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.planning.layout_loads import LayoutLoads, largest_that_fits, last
from cluster.planning.planner import PlanRequest, plan
from qwen3_dist.config import ModelConfig
from qwen3_dist.layout import Layout
from tests.cluster.machines import DENSE, MOE, PLAIN, cluster

# Small steps, so that activations leave room for the caches of some sequences beside the weights.
REQUEST = PlanRequest(100, 50, 1, max_num_batched_tokens=64)
ROOMY = replace(REQUEST, max_num_batched_tokens=8192)
TIGHT = cluster(device=replace(PLAIN.device, memory_bytes=4 * 10**6))


def loads(request: PlanRequest = REQUEST, layout: str = "dp=2", where: object = PLAIN) -> LayoutLoads:
    return LayoutLoads(DENSE, Layout.parse(layout), where, request)  # type: ignore[arg-type]


@pytest.mark.parametrize("most", [0, 1, 2, 7, 8, 100])
@pytest.mark.parametrize("true_up_to", [0, 1, 2, 5, 8, 100])
def test_the_last_number_for_which_something_holds_is_found(most: int, true_up_to: int) -> None:
    asked: list[int] = []

    def holds(number: int) -> bool:
        asked.append(number)
        return number <= true_up_to

    assert last(most, holds) == min(most, true_up_to)
    assert all(1 <= number <= most for number in asked) and len(asked) <= 2 * max(1, most).bit_length()


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.99])
def test_requests_in_flight_are_the_rate_times_the_time_of_a_request(share: float) -> None:
    asked = loads(ROOMY)
    rate = share * asked.requests_per_s(asked.largest)
    found = asked.under(rate)
    one = found.planned
    assert one.itl_ms is not None and found.holds
    assert one.tokens_per_s == pytest.approx(rate * 50)
    # Little: the closed loop of this prediction has its concurrency in flight, and so many finish in a second.
    sequences = one.concurrency // asked.groups
    time_s = one.concurrency / asked.requests_per_s(sequences)
    assert found.in_flight == pytest.approx(rate * time_s)
    # It is the fewest whole sequences of a group that reach the rate.
    assert asked.requests_per_s(sequences) >= rate
    assert sequences == 1 or asked.requests_per_s(sequences - 1) < rate
    assert found.in_flight <= one.concurrency


def test_a_lone_request_takes_its_tokens_times() -> None:
    found = LayoutLoads(DENSE, Layout(), cluster(num_devices=1), PlanRequest(1, 1000, 1)).under(0.1)
    # 1,000 steps of 1.2116 ms, as in test_the_predicted_rate_is_sequences_over_the_time_each_takes.
    assert found.in_flight == pytest.approx(0.1 * 1.2116, rel=5e-3)


def test_in_flight_grows_with_the_rate_and_faster_than_it() -> None:
    asked = loads(ROOMY)
    most = asked.requests_per_s(asked.largest)
    in_flight = [asked.under(share * most).in_flight for share in (0.2, 0.4, 0.8)]
    assert in_flight[1] > 2 * in_flight[0] and in_flight[2] > 2 * in_flight[1]


def test_a_layout_holds_what_its_cache_allows_and_not_more() -> None:
    asked = loads(where=TIGHT)
    assert 0 < asked.largest < 1000
    full, beyond = asked.at(asked.largest), asked.at(asked.largest + 1)
    assert full.max_batch >= asked.largest * 2 and beyond.max_batch < (asked.largest + 1) * 2
    most = asked.requests_per_s(asked.largest)
    assert asked.under(0.999 * most).holds
    above = asked.under(2 * most)
    assert not above.holds and above.most_per_s == pytest.approx(most)
    assert above.planned.tokens_per_s == pytest.approx(most * 50)


def test_a_limit_lowers_what_it_holds() -> None:
    free = loads(ROOMY)
    itl = free.at(8).itl_ms
    assert itl is not None
    bound = loads(replace(ROOMY, itl_ms=itl))
    assert bound.most_within_limits() == 8
    most = free.requests_per_s(8)
    assert bound.under(most).holds and not bound.under(1.01 * most).holds
    found = bound.under(1.01 * most)
    assert found.most_per_s == pytest.approx(most) and found.capacity_per_s > found.most_per_s
    assert loads(replace(ROOMY, itl_ms=itl / 100)).under(0.1).most_per_s == 0


def test_a_layout_that_does_not_fit_serves_nothing() -> None:
    tiny = cluster(device=replace(PLAIN.device, memory_bytes=10**5))
    found = loads(where=tiny).under(1)
    assert not found.planned.fits and not found.holds and found.most_per_s == 0


@pytest.mark.parametrize("config", [DENSE, MOE])
def test_predictions_at_a_load_are_near_those_of_as_many_clients(config: ModelConfig) -> None:
    for one in plan(config, PLAIN, replace(REQUEST, concurrency=16)):
        asked = LayoutLoads(config, one.layout, PLAIN, REQUEST)
        if 16 % asked.groups == 0 and one.fits:
            spread = asked.at(16 // asked.groups)
            assert spread.bytes_per_rank == one.bytes_per_rank and spread.max_batch == one.max_batch
            # Clients that began together have their prompts in the same steps of all groups, others in different ones.
            within = 0.1 if one.layout.dp == 1 else 0.25
            assert spread.tokens_per_s == pytest.approx(one.tokens_per_s, rel=within)


@pytest.mark.parametrize("most", [0, 1, 10, 100])
@pytest.mark.parametrize("each", [0.0, 0.3, 2.0])
def test_sequences_fit_beside_their_own_activations(most: int, each: float) -> None:
    found = largest_that_fits(most, lambda sequences: int(100 - each * sequences))
    assert found == max(n for n in range(most + 1) if n == 0 or int(100 - each * n) >= n)


def test_a_rate_that_is_held_is_held_within_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    free = loads(ROOMY)
    bound = loads(replace(ROOMY, itl_ms=free.at(6).itl_ms))
    assert bound.most_within_limits() == 6
    # More than 6 sequences are slower, as where prompts crowd out decodes.
    monkeypatch.setattr(bound, "requests_per_s", lambda n: 10.0 * n if n <= 6 else 30.0)
    found = bound.under(45.0)
    assert found.holds and found.planned.meets_limits(bound.request)
    assert found.planned.concurrency == 5 * bound.groups
