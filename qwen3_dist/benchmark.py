"""Measures the speed of an engine with random prompts and outputs of fixed length: greedy, EOS ignored."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen3_dist.engine.engine import Engine
from qwen3_dist.machine import hardware, peak_memory_mib, versions
from qwen3_dist.percentiles import percentiles
from qwen3_dist.protocol.outputs import EngineStats
from qwen3_dist.sampling_params import SamplingParams


@dataclass(frozen=True)
class Workload:
    """`num_prompts` random prompts of `input_len` tokens, with `output_len` output tokens each.

    Prompts are run in batches of `batch_size`; None: all at once.
    """

    num_prompts: int
    input_len: int
    output_len: int
    batch_size: int | None = None
    seed: int = 0

    def prompts(self, vocab_size: int) -> list[list[int]]:
        rng = random.Random(self.seed)
        return [[rng.randrange(vocab_size) for _ in range(self.input_len)] for _ in range(self.num_prompts)]


@dataclass
class _Times:
    """The time in seconds at which a request began, and at which each token was returned."""

    begun: float
    tokens: list[float] = field(default_factory=list)


def measure(engine: Engine, workload: Workload) -> dict[str, Any]:
    """Runs the workload and returns the figures. Times are in ms, rates in tokens per second of the whole run."""
    prompts = workload.prompts(engine.model_config.vocab_size)
    before, started = engine.stats(), time.perf_counter()
    size = workload.batch_size or len(prompts)
    times: list[_Times] = []
    for at in range(0, len(prompts), size):
        times += _run(engine, prompts[at : at + size], workload.output_len)
    seconds, after = time.perf_counter() - started, engine.stats()
    steps = after.steps - before.steps
    outputs = sum(len(each.tokens) for each in times)
    inputs = sum(map(len, prompts))
    gaps = [b - a for each in times for a, b in zip(each.tokens, each.tokens[1:], strict=False)]
    return {
        "output_tokens_per_s": round(outputs / seconds, 2),
        "total_tokens_per_s": round((inputs + outputs) / seconds, 2),
        "ttft_ms": percentiles([each.tokens[0] - each.begun for each in times], scale=1e3),
        "itl_ms": percentiles(gaps, scale=1e3),
        "steps": steps,
        "mean_batch": round((after.scheduled_sequences - before.scheduled_sequences) / steps, 2),
        "prefix_hits": after.cached_prompt_tokens - before.cached_prompt_tokens,
        "preemptions": after.preemptions - before.preemptions,
        **_speculation(before, after),
        "peak_memory_mib": peak_memory_mib(),
        "hardware": hardware(),
        "versions": versions(),
    }


def _speculation(before: EngineStats, after: EngineStats) -> dict[str, Any]:
    """Draft tokens and accepted tokens, and the acceptance rate; None without draft tokens."""
    drafted = after.drafted_tokens - before.drafted_tokens
    accepted = after.accepted_tokens - before.accepted_tokens
    rate = round(accepted / drafted, 3) if drafted else None
    return {"drafted_tokens": drafted, "accepted_tokens": accepted, "acceptance_rate": rate}


def warm_up(engine: Engine) -> None:
    """Runs a few steps, so that one-time work is done before the measurement."""
    _run(engine, [[1, 2, 3, 4]], 4)


def _run(engine: Engine, prompts: Sequence[list[int]], output_len: int) -> list[_Times]:
    params = SamplingParams(max_tokens=output_len, temperature=0, ignore_eos=True)
    begun = time.perf_counter()
    times = {str(number): _Times(begun) for number in range(len(prompts))}
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, params)
    while engine.has_work:
        for request_id, deltas in engine.step().items():
            now = time.perf_counter()
            times[request_id].tokens += [now] * sum(len(delta.token_ids) for delta in deltas)
    return list(times.values())
