"""What clients see: TTFT, time between tokens and throughput of a closed loop, or of an open loop at a rate.

Both walk through the steps of one replica (`walk.py`), as the engine's scheduler would form them, with the times of
the cost model. Its dp groups take steps together, and share requests evenly.
"""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean

from cluster.planning.cost_model import CostModel, StepShape
from cluster.planning.dp_groups import GroupShapes, step_seconds
from cluster.planning.steady import SeenSteps, SteadySteps
from cluster.planning.walk import Served, StepRules, Walk, Workload

REQUESTS_EACH = 10  # of a client in a closed loop, as benchmark clients send


@dataclass(frozen=True)
class Latencies:
    """TTFT (mean and percentiles) and the mean time between two tokens, in seconds; requests answered in a second."""

    ttft_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    itl_s: float
    requests_per_s: float


def closed_loop(
    model: CostModel,
    rules: StepRules,
    load: Workload,
    clients: int,
    requests_each: int = REQUESTS_EACH,
    depth: int = 2,
) -> Latencies:
    """Latencies of `clients` clients of a replica. They begin together, and send `requests_each` requests each, one
    when the last is answered. The second round stands for all between the first and the last; beside answers of the
    last, ever fewer prompts are read. `depth`: steps in flight, as of `Walk`; with 1, the device waits for the host
    between steps."""
    seconds = step_seconds(model, load.drafted, rules.max_num_batched_tokens)
    walk = Walk(_with_idle_time(model, seconds) if depth == 1 else seconds, rules, depth=depth)
    served, weights = _rounds(walk, load, clients, requests_each)
    before_s = model.cluster.outside_s(load.input_len)
    in_system_s = fmean((each.last_s - each.sent_s for each in served), weights)
    return _latencies(model, load, served, weights, clients / (before_s + in_system_s))


def _with_idle_time(model: CostModel, seconds: Callable[[StepShape], float]) -> Callable[[StepShape], float]:
    """`seconds` of a step, and how long the device then waits for the next one."""
    cluster, groups = model.cluster, model.layout.dp
    return lambda shape: (
        seconds(shape)
        + cluster.idle_step_overhead_s
        + cluster.idle_sequence_overhead_s * shape.num_samples / groups
    )


def seen_steps(model: CostModel, rules: StepRules, load: Workload, clients: int) -> SeenSteps:
    """The mean steps in which the sequences of `closed_loop` decode. Of a kind that none sees, the mean of all."""
    walk = Walk(step_seconds(model, load.drafted, rules.max_num_batched_tokens), rules, steps=[])
    served, weights = _rounds(walk, load, clients, REQUESTS_EACH)
    assert walk.steps is not None
    changes = sorted(
        change
        for each, weight in zip(served, weights, strict=True)
        for change in ((each.first_s, weight), (each.last_s, -weight))
    )
    times, decoding = [at_s for at_s, _ in changes], list(accumulate(weight for _, weight in changes))
    kinds: tuple[list[tuple[GroupShapes, float]], ...] = ([], [])
    for shape, number, at_s in walk.steps:
        place = bisect_right(times, at_s)
        weight = number * decoding[place - 1] if place else 0.0
        shapes = GroupShapes.of(shape, rules.groups, load.drafted, rules.max_num_batched_tokens)
        kinds[shape.prefill_tokens > 0].append((shapes, weight))
    counted = [sum(weight for _, weight in kind) for kind in kinds]
    decode, prompt = (
        GroupShapes.average(kind if weight > 0 else [(shapes, 1.0) for shapes, _ in kind])
        for kind, weight in zip(kinds, counted, strict=True)
    )
    return SeenSteps(decode, prompt, counted[1] / (sum(counted) or 1.0))


def _rounds(walk: Walk, load: Workload, clients: int, requests_each: int) -> tuple[list[Served], list[float]]:
    """The requests of a closed loop, with the number of requests that each stands for."""
    rounds = min(3, requests_each)
    served = walk.serve([load.request._replace(followers=rounds - 1)] * clients)
    return served, [
        requests_each - 2.0 if each.request.followers == 1 < rounds - 1 else 1.0 for each in served
    ]


def open_loop(
    model: CostModel, rules: StepRules, load: Workload, rate: float, num_requests: int, seed: int = 0
) -> Latencies:
    """Latencies of `num_requests` requests that reach a replica at random (Poisson), `rate` a second on average.

    Beyond the replica's capacity the wait grows with `num_requests`; then requests_per_s is below `rate`.
    """
    arrivals = random.Random(seed)
    times = accumulate(arrivals.expovariate(rate) for _ in range(num_requests))
    walk = Walk(step_seconds(model, load.drafted, rules.max_num_batched_tokens), rules)
    served = walk.serve(load.request._replace(arrival_s=arrival_s) for arrival_s in times)
    answered_s = max(each.last_s for each in served) - min(each.last_s for each in served)
    answered = (num_requests - 1) / answered_s if answered_s else rate
    return _latencies(model, load, served, [1.0] * len(served), answered)


def spread_out(model: CostModel, rules: StepRules, load: Workload, batch: int, demand: int) -> Latencies:
    """Means of a steady state in which requests come at random, and `batch` of them are in a replica on average. Of
    `demand` requests the others wait until one of these ends. The percentiles are the mean."""
    state = SteadySteps(model, rules, load, batch).state()
    queue_s = max(0, demand - batch) / state.rate
    ttft_s = queue_s + state.wait_s + state.prompt_s + model.cluster.outside_s(load.input_len)
    itl_s = state.step_s * load.decode_steps / max(1, load.output_len - 1)
    return Latencies(ttft_s, ttft_s, ttft_s, ttft_s, itl_s, state.rate)


def _latencies(
    model: CostModel,
    load: Workload,
    served: Sequence[Served],
    weights: Sequence[float],
    requests_per_s: float,
) -> Latencies:
    before_s = model.cluster.outside_s(load.input_len)
    waits = sorted((each.ttft_s + before_s, weight) for each, weight in zip(served, weights, strict=True))
    reached = list(accumulate(weight for _, weight in waits))
    p50, p90, p99 = (waits[bisect_left(reached, share * reached[-1])][0] for share in (0.5, 0.9, 0.99))
    steps = load.decode_steps / max(1, load.output_len - 1)  # for each token after the first
    return Latencies(
        fmean((wait for wait, _ in waits), [weight for _, weight in waits]),
        p50,
        p90,
        p99,
        steps * fmean((each.itl_s for each in served), weights),
        requests_per_s,
    )
