"""What the cost model says of a benchmark's run: prompts that all come at once, each with the same lengths.

A step takes the decodes first and then prompts in order, as the engine's scheduler does while the cache has room.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from cluster.cost_model import CostModel, StepShape
from qwen3_dist.errors import ConfigError


@dataclass(frozen=True)
class BurstPoint:
    """One run: `num_prompts` prompts of `input_len` tokens at once, and `output_len` tokens from each."""

    num_prompts: int
    input_len: int
    output_len: int

    def __post_init__(self) -> None:
        for name in ("num_prompts", "input_len", "output_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}")

    def __str__(self) -> str:
        return f"{self.num_prompts}×({self.input_len}→{self.output_len})"


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


def predict_burst(
    model: CostModel, point: BurstPoint, max_num_batched_tokens: int, max_num_seqs: int
) -> BurstFigures:
    """Walks through the steps of one dp group; its share of the prompts is the largest any group has."""
    waiting = [_Running(point.input_len) for _ in range(-(-point.num_prompts // model.layout.dp))]
    running: list[_Running] = []
    done: list[_Running] = []
    now = 0.0
    while waiting or running:
        while waiting and len(running) < max_num_seqs:
            running.append(waiting.pop(0))
        shape, advanced = _step(running, max_num_batched_tokens)
        now += model.step_seconds(shape)
        for each in advanced:
            each.times = (*each.times, now)
        done += [each for each in running if len(each.times) == point.output_len]
        running = [each for each in running if len(each.times) < point.output_len]
    gaps = [b - a for each in done for a, b in zip(each.times, each.times[1:], strict=False)]
    return BurstFigures(
        1e3 * statistics.median(each.times[0] for each in done),
        1e3 * statistics.median(gaps) if gaps else None,
        point.num_prompts * point.output_len / now,
    )


def _step(running: list[_Running], budget: int) -> tuple[StepShape, list[_Running]]:
    """The next step's shape, counted as computed, and the sequences that get a token by it."""
    decodes = [each for each in running if not each.prompt_left][:budget]
    context = sum(each.context + 1 for each in decodes)
    for each in decodes:
        each.context += 1
    left, tokens, pairs = budget - len(decodes), 0, 0
    advanced = list(decodes)
    for each in running:
        chunk = min(each.prompt_left, left)
        if not chunk:
            continue
        pairs += chunk * each.context + chunk * (chunk + 1) // 2
        each.prompt_left -= chunk
        each.context += chunk
        left, tokens = left - chunk, tokens + chunk
        if not each.prompt_left:
            advanced.append(each)
    return StepShape(len(decodes), context, tokens, pairs, len(advanced)), advanced
