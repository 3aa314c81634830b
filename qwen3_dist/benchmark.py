"""Measures the speed of an engine with random prompts and outputs of fixed length: greedy, EOS ignored."""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen3_dist.arrival_times import arrival_times
from qwen3_dist.engine.engine import Engine
from qwen3_dist.machine import hardware, peak_memory_mib, versions
from qwen3_dist.percentiles import percentiles
from qwen3_dist.protocol.outputs import EngineStats
from qwen3_dist.sampling_params import SamplingParams


@dataclass(frozen=True)
class Workload:
    """`num_prompts` random prompts of `input_len` tokens, with `output_len` output tokens each.

    Prompts are run in batches of `batch_size`; None: all at once, or at `rate` a second with the gaps of a Poisson
    process (an open loop).
    """

    num_prompts: int
    input_len: int
    output_len: int
    batch_size: int | None = None
    seed: int = 0
    rate: float = math.inf

    def prompts(self, vocab_size: int) -> list[list[int]]:
        rng = random.Random(self.seed)
        return [[rng.randrange(vocab_size) for _ in range(self.input_len)] for _ in range(self.num_prompts)]

    def arrivals(self, count: int) -> list[float]:
        """Seconds after the start at which each of `count` prompts arrives."""
        return arrival_times(count, self.rate, 1.0, self.seed)


@dataclass
class _Times:
    """The time in seconds at which a request arrived, and at which each token was returned."""

    begun: float
    tokens: list[float] = field(default_factory=list)


def measure(engine: Engine, workload: Workload) -> dict[str, Any]:
    """Runs the workload and returns the figures. Times are in ms, rates in tokens per second of the whole run."""
    prompts = workload.prompts(engine.model_config.vocab_size)
    before, started = engine.stats(), time.perf_counter()
    size = workload.batch_size or len(prompts)
    times: list[_Times] = []
    for at in range(0, len(prompts), size):
        batch = prompts[at : at + size]
        times += _run(engine, batch, workload.output_len, workload.arrivals(len(batch)))
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
    _run(engine, [[1, 2, 3, 4]], 4, [0.0])


def _run(
    engine: Engine, prompts: Sequence[list[int]], output_len: int, arrivals_s: Sequence[float]
) -> list[_Times]:
    """Runs prompts that arrive at these times. One that arrives during a step waits for its end, as in a service."""
    params = SamplingParams(max_tokens=output_len, temperature=0, ignore_eos=True)
    begun = time.perf_counter()
    times = {str(number): _Times(begun + arrival) for number, arrival in enumerate(arrivals_s)}
    coming = deque(enumerate(prompts))
    while coming or engine.has_work:
        while coming and arrivals_s[coming[0][0]] <= time.perf_counter() - begun:
            number, prompt = coming.popleft()
            engine.add_request(str(number), prompt, params)
        if not engine.has_work:
            time.sleep(max(0.0, begun + arrivals_s[coming[0][0]] - time.perf_counter()))
            continue
        for request_id, deltas in engine.step().items():
            now = time.perf_counter()
            times[request_id].tokens += [now] * sum(len(delta.token_ids) for delta in deltas)
    return list(times.values())
