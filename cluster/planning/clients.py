"""What clients see: TTFT, time between tokens and throughput of a closed loop, or of an open loop at a rate.

Both walk through the steps of one replica (`walk.py`), as the engine's scheduler would form them, with the times of
the cost model. Its dp groups take steps together, and share requests evenly.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil
from statistics import fmean

from cluster.planning.cost_model import CostModel, StepLine, StepShape
from cluster.planning.walk import Request, Served, StepRules, Walk

REQUESTS_EACH = 10  # of a client in a closed loop, as benchmark clients send


@dataclass(frozen=True)
class Workload:
    """Equal requests. `cached_len` tokens of a prompt are found in the prefix cache. A decode step drafts `drafted`
    tokens for each sequence, of which `accepted` are accepted on average."""

    input_len: int
    output_len: int
    cached_len: int = 0
    drafted: int = 0
    accepted: float = 0.0

    @property
    def decode_steps(self) -> int:
        """Decode steps of a sequence."""
        return ceil((self.output_len - 1) / (1 + self.accepted))

    @property
    def request(self) -> Request:
        """A request to walk with: one token for each step. Its context is right on average: the tokens that have no
        step of their own are there from the beginning, by half."""
        added = (self.output_len - 1 - self.decode_steps) // 2
        return Request(self.input_len + added, 1 + self.decode_steps, cached_len=self.cached_len + added)


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
    model: CostModel, rules: StepRules, load: Workload, clients: int, requests_each: int = REQUESTS_EACH
) -> Latencies:
    """Latencies of `clients` clients of a replica. They begin together, and send `requests_each` requests each, one
    when the last is answered. Two rounds after the first stand for all others."""
    rounds = min(3, requests_each)
    first = load.request._replace(followers=rounds - 1)
    before_s = model.cluster.request_overhead_s
    walk = Walk(step_seconds(model, load.drafted), rules)
    served = walk.serve([first] * clients)
    later = (requests_each - 1) / (rounds - 1) if rounds > 1 else 0.0
    weights = [1.0 if each.request.followers == rounds - 1 else later for each in served]
    in_system_s = fmean((each.last_s - each.sent_s for each in served), weights)
    return _latencies(model, load, served, weights, clients / (before_s + in_system_s))


def open_loop(
    model: CostModel, rules: StepRules, load: Workload, rate: float, num_requests: int, seed: int = 0
) -> Latencies:
    """Latencies of `num_requests` requests that reach a replica at random (Poisson), `rate` a second on average.

    Beyond the replica's capacity the wait grows with `num_requests`; then requests_per_s is below `rate`.
    """
    arrivals = random.Random(seed)
    times = accumulate(arrivals.expovariate(rate) for _ in range(num_requests))
    walk = Walk(step_seconds(model, load.drafted), rules)
    served = walk.serve(load.request._replace(arrival_s=arrival_s) for arrival_s in times)
    answered_s = max(each.last_s for each in served) - min(each.last_s for each in served)
    answered = (num_requests - 1) / answered_s if answered_s else rate
    return _latencies(model, load, served, [1.0] * len(served), answered)


def spread_out(model: CostModel, rules: StepRules, load: Workload, batch: int, demand: int) -> Latencies:
    """Means of a steady state in which `batch` sequences of a replica run at a time, and requests come one by one at
    random, in closed form. Of `demand` requests, those beyond `batch` queue.

    In one cycle every sequence ends and is replaced: its decode steps, and one prompt for each sequence beside the
    decodes of others. A request waits for the rest of the step that it comes in and for the next one, which is planned
    already. The step that it comes in is longer than the mean, by the variance over the mean, since more requests come
    in a long step. Then it shares its own step with the prompts that came in the same step as it. If a prompt is more
    than one step holds, it waits for others' prompts as in a queue with random arrivals and equal services (Pollaczek
    and Khinchine). The percentiles are the mean.
    """
    seconds = step_seconds(model, load.drafted)
    of_group = ceil(batch / rules.groups)
    budget = max(1, rules.max_num_batched_tokens - of_group)
    prompt, known = load.input_len - load.cached_len, load.cached_len
    output = 1 + load.decode_steps
    context = batch * (load.input_len + load.output_len / 2)
    decode_s = seconds(StepShape(batch, int(context), 0, 0, batch))
    chunks = ceil(prompt / budget)
    steps = max(ceil(of_group * prompt / budget), min(output, batch * chunks))
    decoding = batch * (output - 1) / max(output, steps)
    pairs = batch * (prompt * known + prompt * (prompt + 1) / 2) / steps
    mixed_s = seconds(
        StepShape(
            round(decoding),
            int(context * decoding / batch),
            round(batch * prompt / steps),
            int(pairs),
            max(1, round(decoding + batch * chunks / steps)),
        )
    )
    cycle_s = steps * mixed_s + max(0, output - steps) * decode_s
    if batch == 1:
        wait_s, own_s = 0.0, chunks * mixed_s  # a request finds nothing that runs
    elif chunks == 1:
        prompt_s = max(0.0, (mixed_s - decode_s) * steps / batch)
        step_s, rate = cycle_s / max(output, steps), batch / cycle_s
        # Requests of a step are Poisson, and each makes the next one longer by prompt_s.
        seen_s = step_s + rate * prompt_s**2 / (1 - (rate * prompt_s) ** 2)
        wait_s = seen_s / 2 + step_s
        own_s = decode_s + prompt_s * (1 + rate * seen_s)
    else:
        shared = min(steps * mixed_s / cycle_s, 1 - 1 / (1 + batch))
        in_flight_s = shared * mixed_s + (1 - shared) * decode_s
        # A prompt waits for others of its own group, and for those of its batch at most.
        busy = min(shared, of_group * chunks * mixed_s / cycle_s, 1 - 1 / (1 + of_group))
        wait_s = chunks * mixed_s * busy / (2 * (1 - busy)) + 1.5 * in_flight_s
        own_s = chunks * mixed_s
    queue_s = max(0, demand - batch) / batch * cycle_s
    ttft_s = queue_s + wait_s + own_s + model.cluster.request_overhead_s
    return Latencies(ttft_s, ttft_s, ttft_s, ttft_s, cycle_s / load.output_len, batch / cycle_s)


def step_seconds(model: CostModel, drafted: int = 0) -> Callable[[StepShape], float]:
    """Seconds of a step of all dp groups of a replica, of which `shape` is the sum; `drafted` tokens more are computed
    for each decode.

    Decodes are spread evenly. A step takes as long as that of the group with the most prompts; the experts, which all
    groups share, get the tokens of all.
    """
    remembered: dict[tuple[int, int, int], tuple[list[StepLine], float]] = {}
    groups = model.layout.dp

    def lines_of(decodes: int, tokens: int, samples: int) -> tuple[list[StepLine], float]:
        """The lines of the group with the most prompts, and its share of the prompts."""
        prompts = max(1, samples - decodes)
        share = ceil(prompts / groups) / prompts
        each = ceil(decodes / groups)
        more = ceil(prompts / groups) if tokens else 0
        largest = ((1 + drafted) * each, round(tokens * share), (1 + drafted) * each + more)
        lines = model.step_lines(*largest)
        if groups > 1 and tokens and model.config.num_experts:
            mean = ((1 + drafted) * each, ceil(tokens / groups), 0)
            saved_s = max(0.0, _expert_seconds(model, largest) - _expert_seconds(model, mean))
            lines = [line._replace(constant_s=line.constant_s - saved_s) for line in lines]
        return lines, share

    def seconds(shape: StepShape) -> float:
        key = shape.num_decodes, shape.prefill_tokens, shape.num_samples
        if key not in remembered:
            remembered[key] = lines_of(*key)
        lines, share = remembered[key]
        context, pairs = shape.decode_context_tokens / groups, shape.prefill_pairs * share
        return max([constant + context * a + pairs * b for constant, a, b in lines])

    return seconds


def _expert_seconds(model: CostModel, tokens: tuple[int, int, int]) -> float:
    decodes, prompts, samples = tokens
    return model.step_parts(StepShape(decodes, 0, prompts, 0, samples)).get("experts", 0.0)


def _latencies(
    model: CostModel,
    load: Workload,
    served: Sequence[Served],
    weights: Sequence[float],
    requests_per_s: float,
) -> Latencies:
    before_s = model.cluster.request_overhead_s
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
