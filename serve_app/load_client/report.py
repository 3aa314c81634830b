"""What a run measured, with the names, units and meanings of `vllm bench serve`."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwen3_dist.percentiles import percentile
from serve_app.load_client.client import Outcome

# Metrics by vLLM's names: the abbreviation and the heading in the report.
METRICS = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}
GOODPUT_METRICS = ("ttft", "tpot", "e2el")
_WIDTH = 50


def tpot(outcome: Outcome) -> float | None:
    """Seconds for each output token after the first; None for an answer of one token."""
    if outcome.output_tokens < 2:
        return None
    return (outcome.latency - outcome.ttft) / (outcome.output_tokens - 1)


def figures(
    outcomes: Sequence[Outcome],
    duration_s: float,
    metrics: Sequence[str],
    percents: Sequence[float],
    goodput_ms: Mapping[str, float],
) -> dict[str, Any]:
    """The numbers of vLLM's result file. Latencies are in ms; those of no request are 0, as there.

    `goodput_ms` are the limits that a request must keep to count for `request_goodput`.
    """
    good = [outcome for outcome in outcomes if not outcome.error]
    errors = [outcome.error for outcome in outcomes if outcome.error]
    inputs = sum(outcome.input_tokens for outcome in good)
    outputs = sum(outcome.output_tokens for outcome in good)
    kept = sum(_keeps(outcome, goodput_ms) for outcome in good)
    found: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(good),
        "failed": len(errors),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(good) / duration_s,
        "request_goodput": kept / duration_s if goodput_ms else None,
        "output_throughput": outputs / duration_s,
        "total_token_throughput": (inputs + outputs) / duration_s,
        "max_output_tokens_per_s": peak_tokens_per_s(good),
        "max_concurrent_requests": peak_concurrency(good),
        "first_error": errors[0] if errors else None,
    }
    seconds = {
        "ttft": [outcome.ttft for outcome in good],
        "tpot": [each for outcome in good if (each := tpot(outcome)) is not None],
        "itl": [gap for outcome in good for gap in outcome.itl],
        "e2el": [outcome.latency for outcome in good],
    }
    for name in metrics:
        values = sorted(1e3 * each for each in seconds[name]) or [0.0]
        found[f"mean_{name}_ms"] = statistics.fmean(values)
        found[f"median_{name}_ms"] = percentile(values, 50)
        found[f"std_{name}_ms"] = statistics.pstdev(values)
        found |= {f"p{percent:g}_{name}_ms": percentile(values, percent) for percent in percents}
    return found


def details(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """vLLM's lists with one item for each request, in the order of the dataset. Times are in seconds."""
    return {
        "input_lens": [outcome.input_tokens for outcome in outcomes],
        "output_lens": [outcome.output_tokens for outcome in outcomes],
        "ttfts": [outcome.ttft for outcome in outcomes],
        "itls": [outcome.itl for outcome in outcomes],
        "latencies": [outcome.latency for outcome in outcomes],
        "start_times": [outcome.started for outcome in outcomes],
        "queue_times": [outcome.queued for outcome in outcomes],
        "errors": [outcome.error for outcome in outcomes],
    }


def peak_tokens_per_s(outcomes: Sequence[Outcome]) -> float:
    """Most output tokens in one of the seconds since the first request was sent.

    A request's tokens are spread evenly over the parts of its stream, since a part does not say how many it holds.
    """
    if not outcomes:
        return 0.0
    begun = min(outcome.started for outcome in outcomes)
    seconds: defaultdict[int, float] = defaultdict(float)
    for outcome in outcomes:
        at, share = outcome.started + outcome.ttft, outcome.output_tokens / (len(outcome.itl) + 1)
        for gap in (0.0, *outcome.itl):
            at += gap
            seconds[math.floor(at - begun)] += share
    return max(seconds.values())


def peak_concurrency(outcomes: Sequence[Outcome]) -> int:
    """Most requests in flight at one moment."""
    changes = [(outcome.started, 1) for outcome in outcomes]
    changes += [(outcome.started + outcome.latency, -1) for outcome in outcomes]
    running = most = 0
    for _, change in sorted(changes):  # at equal times ends come first
        running += change
        most = max(most, running)
    return most


def report_lines(result: Mapping[str, Any], metrics: Sequence[str]) -> Iterator[str]:
    """The report that people read, in the columns of `vllm bench serve`."""
    yield f"{' Serving Benchmark Result ':=^{_WIDTH}}"
    yield _line("Successful requests:", result["completed"])
    yield _line("Failed requests:", result["failed"])
    if result["max_concurrency"]:
        yield _line("Maximum request concurrency:", result["max_concurrency"])
    if result["request_rate"] != "inf":
        yield _line("Request rate configured (RPS):", result["request_rate"])
    yield _line("Benchmark duration (s):", result["duration"])
    yield _line("Total input tokens:", result["total_input_tokens"])
    yield _line("Total generated tokens:", result["total_output_tokens"])
    yield _line("Request throughput (req/s):", result["request_throughput"])
    if result["request_goodput"] is not None:
        yield _line("Request goodput (req/s):", result["request_goodput"])
    yield _line("Output token throughput (tok/s):", result["output_throughput"])
    yield _line("Peak output token throughput (tok/s):", result["max_output_tokens_per_s"])
    yield _line("Peak concurrent requests:", float(result["max_concurrent_requests"]))
    yield _line("Total token throughput (tok/s):", result["total_token_throughput"])
    for name in metrics:
        short, heading = METRICS[name]
        yield f"{heading:-^{_WIDTH}}"
        yield _line(f"Mean {short} (ms):", result[f"mean_{name}_ms"])
        yield _line(f"Median {short} (ms):", result[f"median_{name}_ms"])
        for key, value in result.items():
            if key.startswith("p") and key.endswith(f"_{name}_ms"):
                yield _line(f"{key.partition('_')[0].upper()} {short} (ms):", value)
    yield "=" * _WIDTH
    if result["first_error"]:
        yield f"First error: {result['first_error']}"


def _line(label: str, value: float) -> str:
    return f"{label:<40} {value:<10.2f}".rstrip() if isinstance(value, float) else f"{label:<40} {value}"


def _keeps(outcome: Outcome, limits_ms: Mapping[str, float]) -> bool:
    """Whether a request keeps every limit. An answer of one token has a TPOT of 0."""
    values = {"ttft": outcome.ttft, "tpot": tpot(outcome) or 0.0, "e2el": outcome.latency}
    return all(1e3 * values[name] <= limit for name, limit in limits_ms.items())
