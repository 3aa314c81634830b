"""Runs the arrivals of a simulation through the real engine, with one client task per request."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.simulation.arrivals import Request
from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.percentiles import percentile
from qwen3_dist.sampling_params import SamplingParams


@dataclass
class RealRun:
    """What clients observed, in seconds from the start; one entry per request."""

    arrivals_s: list[float] = field(default_factory=list)
    first_tokens_s: list[float] = field(default_factory=list)
    last_tokens_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)  # between tokens of one request
    tokens: int = 0
    cached_prompt_tokens: int = 0
    preemptions: int = 0
    steps: int = 0

    def figures(self) -> dict[str, float]:
        """Output tokens per second until the last request ends, and latencies in ms."""
        ttft = sorted(
            first - arrival for arrival, first in zip(self.arrivals_s, self.first_tokens_s, strict=True)
        )
        return {
            "output_tokens_per_s": self.tokens / max(self.last_tokens_s),
            "ttft_p50_ms": 1e3 * percentile(ttft, 50),
            "ttft_p90_ms": 1e3 * percentile(ttft, 90),
            "itl_p50_ms": 1e3 * percentile(sorted(self.gaps_s), 50),
        }


def run_for_real(engine: AsyncEngine, requests: Sequence[Request], seed: int) -> RealRun:
    """Sends each request when it is due and waits for all tokens."""
    return asyncio.run(_run(engine, requests, random.Random(seed)))


async def _run(engine: AsyncEngine, requests: Sequence[Request], rng: random.Random) -> RealRun:
    run, before = RealRun(), engine.stats()
    vocab_size = engine.model_config.vocab_size
    prefixes: dict[int, list[int]] = {}

    def tokens(count: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(count)]

    prompts = []
    for request in requests:
        prefix = prefixes.setdefault(request.prefix_id, tokens(request.prefix_len))
        shared = prefix[: request.prefix_len]
        prompts.append(shared + tokens(request.input_len - len(shared)))
    started = time.perf_counter()

    async def send(number: int, request: Request) -> None:
        await asyncio.sleep(started + request.arrival_s - time.perf_counter())
        params = SamplingParams(max_tokens=request.output_len, temperature=0, ignore_eos=True)
        times: list[float] = []
        async for deltas in engine.generate(prompts[number], params, f"real{number}"):
            now = time.perf_counter() - started
            times += [now] * sum(len(delta.token_ids) for delta in deltas)
        run.arrivals_s.append(request.arrival_s)
        run.first_tokens_s.append(times[0])
        run.last_tokens_s.append(times[-1])
        run.gaps_s += [b - a for a, b in zip(times, times[1:], strict=False)]
        run.tokens += len(times)

    await asyncio.gather(*(send(number, request) for number, request in enumerate(requests)))
    after: Any = engine.stats()
    run.cached_prompt_tokens = after.cached_prompt_tokens - before.cached_prompt_tokens
    run.preemptions = after.preemptions - before.preemptions
    run.steps = after.steps - before.steps
    return run
