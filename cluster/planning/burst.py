"""What the cost model says of a benchmark's run: prompts that all come at once, each with the same lengths.

A step takes the decodes first and then prompts in order, as the engine's scheduler does while the cache has room;
under pp it takes its part of the decodes, and others follow it before it is through.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass

from cluster.planning.burst_point import BurstPoint
from cluster.planning.cost_model import CostModel, StepShape


@dataclass(frozen=True)
class BurstFigures:
    """Medians over requests and gaps, and the rate of the whole run. itl_ms is None for one token each."""

    ttft_ms: float
    itl_ms: float | None
    output_tokens_per_s: float


@dataclass
class _Running:
    prompt_left: int
    context: int = 0
    times: tuple[float, ...] = ()
    in_flight: bool = False


def predict_burst(
    model: CostModel, point: BurstPoint, max_num_batched_tokens: int, max_num_seqs: int
) -> BurstFigures:
    """Walks through the steps of one dp group; its share of the prompts is the largest any group has."""
    waiting = [_Running(point.input_len) for _ in range(-(-point.num_prompts // model.layout.dp))]
    running: list[_Running] = []
    done: list[_Running] = []
    under_way: deque[tuple[float, list[_Running], list[_Running]]] = (
        deque()
    )  # end, its sequences, who gets a token
    now = first_stage_free = 0.0
    while waiting or running:
        while waiting and len(running) < max_num_seqs:
            running.append(waiting.pop(0))
        free = [each for each in running if not each.in_flight]
        if free and len(under_way) < model.layout.pp:
            shape, taken, advanced = _step(free, -(-len(running) // model.layout.pp), max_num_batched_tokens)
            through, until_next = model.micro_batch_seconds(shape)
            start = max(now, first_stage_free)
            first_stage_free = start + until_next
            under_way.append((start + through, taken, advanced))
            continue
        now, taken, advanced = under_way.popleft()
        for each in taken:
            each.in_flight = False
        for each in advanced:
            each.times = (*each.times, now)
        done += [each for each in advanced if len(each.times) == point.output_len]
        running = [each for each in running if len(each.times) < point.output_len]
    gaps = [b - a for each in done for a, b in zip(each.times, each.times[1:], strict=False)]
    return BurstFigures(
        1e3 * statistics.median(each.times[0] for each in done),
        1e3 * statistics.median(gaps) if gaps else None,
        point.num_prompts * point.output_len / now,
    )


def _step(
    free: list[_Running], most_decodes: int, budget: int
) -> tuple[StepShape, list[_Running], list[_Running]]:
    """The next step's shape, counted as computed, its sequences, and those that get a token by it."""
    decodes = [each for each in free if not each.prompt_left][: min(budget, most_decodes)]
    for each in decodes:
        each.context += 1
    context = sum(each.context for each in decodes)
    left, tokens, pairs = budget - len(decodes), 0, 0
    taken, advanced = list(decodes), list(decodes)
    for each in free:
        chunk = min(each.prompt_left, left)
        if not chunk:
            continue
        pairs += chunk * each.context + chunk * (chunk + 1) // 2
        each.prompt_left -= chunk
        each.context += chunk
        left, tokens = left - chunk, tokens + chunk
        taken.append(each)
        if not each.prompt_left:
            advanced.append(each)
    for each in taken:
        each.in_flight = True
    return StepShape(len(decodes), context, tokens, pairs, len(advanced)), taken, advanced
