"""Predicts a benchmark run whose prompts arrive at once or at given times, by walking through its steps.

A step takes decodes first, then prompts in order, as the engine's scheduler does while the KV cache has room. Under pp
up to pp steps are in flight, each with its share of the decodes.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.planning.burst_point import BurstPoint
from cluster.planning.cost_model import CostModel, StepShape
from qwen3_dist.percentiles import percentile


@dataclass(frozen=True)
class BurstFigures:
    """Median TTFT and ITL, the 90th percentile of TTFT, and output throughput of the whole run. itl_ms is None if each
    prompt gets one token."""

    ttft_ms: float
    itl_ms: float | None
    output_tokens_per_s: float
    ttft_p90_ms: float


@dataclass
class _Running:
    """A sequence: prompt tokens left to prefill, its arrival, tokens computed, and the times of its output tokens."""

    prompt_left: int
    arrival_s: float = 0.0
    context: int = 0
    times: tuple[float, ...] = ()
    in_flight: bool = False


def predict_burst(
    model: CostModel,
    point: BurstPoint,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    arrivals_s: Sequence[float] = (),
) -> BurstFigures:
    """Simulates the dp group with the most prompts.

    `arrivals_s` are the ordered times of all prompts, which groups take in turn; without them all arrive at once.
    """
    times = arrivals_s or [0.0] * point.num_prompts
    waiting = [_Running(point.input_len, arrival) for arrival in times[:: model.layout.dp]]
    running: list[_Running] = []
    done: list[_Running] = []
    # Steps in flight: end time, sequences in the step, sequences that get a token from it.
    in_flight_steps: deque[tuple[float, list[_Running], list[_Running]]] = deque()
    now = first_stage_free = 0.0
    while waiting or running:
        if waiting and not running:
            now = max(now, waiting[0].arrival_s)
        while waiting and len(running) < max_num_seqs and waiting[0].arrival_s <= now:
            running.append(waiting.pop(0))
        free = [each for each in running if not each.in_flight]
        if free and len(in_flight_steps) < model.layout.pp:
            shape, scheduled, advanced = _step(
                free, -(-len(running) // model.layout.pp), max_num_batched_tokens
            )
            through, until_next = model.micro_batch_seconds(shape)
            start = max(now, first_stage_free)
            first_stage_free = start + until_next
            in_flight_steps.append((start + through, scheduled, advanced))
            continue
        now, scheduled, advanced = in_flight_steps.popleft()
        for each in scheduled:
            each.in_flight = False
        for each in advanced:
            each.times = (*each.times, now)
        done += [each for each in advanced if len(each.times) == point.output_len]
        running = [each for each in running if len(each.times) < point.output_len]
    gaps = [b - a for each in done for a, b in zip(each.times, each.times[1:], strict=False)]
    firsts = sorted(each.times[0] - each.arrival_s for each in done)
    return BurstFigures(
        1e3 * statistics.median(firsts),
        1e3 * statistics.median(gaps) if gaps else None,
        point.num_prompts * point.output_len / now,
        1e3 * percentile(firsts, 90),
    )


def _step(
    free: list[_Running], most_decodes: int, budget: int
) -> tuple[StepShape, list[_Running], list[_Running]]:
    """Plans a step: its shape, its sequences, and those of them that get a token. Updates the sequences."""
    decodes = [each for each in free if not each.prompt_left][: min(budget, most_decodes)]
    for each in decodes:
        each.context += 1
    context = sum(each.context for each in decodes)
    left, tokens, pairs = budget - len(decodes), 0, 0
    scheduled, advanced = list(decodes), list(decodes)
    for each in free:
        chunk = min(each.prompt_left, left)
        if not chunk:
            continue
        pairs += chunk * each.context + chunk * (chunk + 1) // 2
        each.prompt_left -= chunk
        each.context += chunk
        left, tokens = left - chunk, tokens + chunk
        scheduled.append(each)
        if not each.prompt_left:
            advanced.append(each)
    for each in scheduled:
        each.in_flight = True
    return StepShape(len(decodes), context, tokens, pairs, len(advanced)), scheduled, advanced
