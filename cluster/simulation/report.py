"""The report of a simulation: latencies, SLO attainment, throughput, replicas over time and GPU-hours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from cluster.planning.plots import plot_stacked
from cluster.simulation.service import Outcome
from qwen3_dist.errors import ConfigError
from qwen3_dist.percentiles import percentiles, weighted_percentiles

_HOUR_S = 3600.0


@dataclass(frozen=True)
class Limits:
    """Limits (SLOs) of a request: its time to first token, and its mean inter-token latency."""

    ttft_ms: float | None = None
    itl_ms: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft_ms", "itl_ms"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be positive, not {value:g}")


def summarize(outcome: Outcome, limits: Limits) -> dict[str, Any]:
    """The report as plain values. Units are in the names. Rates are over the time from 0 to the end of the last
    request. Refused requests count as missing both limits."""
    recorder, span_s = outcome.recorder, outcome.end_s
    arrivals, firsts, lasts = recorder.arrivals_s, recorder.first_tokens_s, recorder.last_tokens_s
    outputs = recorder.output_lens
    before = [outcome.simulation.outside_s(input_len) for input_len in recorder.input_lens]
    ttft = [
        1e3 * (first - arrival + outside_s)
        for arrival, first, outside_s in zip(arrivals, firsts, before, strict=True)
    ]
    tpot = [  # of requests with more than one token
        1e3 * (last - first) / (count - 1) if count > 1 else 0.0
        for first, last, count in zip(firsts, lasts, outputs, strict=True)
    ]
    latency = [
        last - arrival + outside_s for arrival, last, outside_s in zip(arrivals, lasts, before, strict=True)
    ]
    prompt, cached = outcome.counts.prompt_tokens, outcome.counts.cached_prompt_tokens
    return {
        "requests": len(arrivals) + outcome.refused,
        "refused": outcome.refused,
        "span_s": round(span_s, 3),
        "requests_per_s": _rate(len(arrivals), span_s),
        "input_tokens_per_s": _rate(sum(recorder.input_lens), span_s),
        "output_tokens_per_s": _rate(sum(outputs), span_s),
        "ttft_ms": _with_mean(ttft),
        "itl_ms": weighted_percentiles(recorder.itl_us, 1e-3),
        "tpot_ms": percentiles([each for each, count in zip(tpot, outputs, strict=True) if count > 1]),
        "latency_s": percentiles(latency),
        "slo": _attainment(limits, ttft, tpot, outcome.refused),
        "replicas": _replicas(outcome),
        "prefix_hits": {"tokens": cached, "share": round(cached / prompt, 4) if prompt else 0.0},
        "preemptions": outcome.counts.preemptions,
        "simulation": {
            "devices": _most_devices(outcome),
            "steps": outcome.steps,
            "events": outcome.events,
            "wall_s": round(outcome.wall_s, 3),
            "steps_per_s": _rate(outcome.steps, outcome.wall_s),
            "events_per_s": _rate(outcome.events, outcome.wall_s),
            "seconds_per_s": _rate(span_s, outcome.wall_s),
        },
    }


def plot_replicas(file: Path, title: str, outcome: Outcome) -> None:
    """Stacked chart of running, draining and starting replicas over time. Raises ConfigError without matplotlib."""
    history = outcome.replica_counts
    times = [count.time_s for count in history] + [outcome.end_s]
    series = {
        name: [getattr(count, name) for count in [*history, history[-1]]]
        for name in ("running", "draining", "starting")
    }
    plot_stacked(file, title, "seconds", "replicas", times, series)


def _with_mean(values: list[float]) -> dict[str, float] | None:
    found = percentiles(values)
    return None if found is None else {"mean": round(fmean(values), 3), **found}


def _attainment(limits: Limits, ttft: list[float], tpot: list[float], refused: int) -> dict[str, Any]:
    """Shares of all requests that meet each limit, and both limits."""
    total = len(ttft) + refused
    in_ttft = [limits.ttft_ms is None or value <= limits.ttft_ms for value in ttft]
    in_itl = [limits.itl_ms is None or value <= limits.itl_ms for value in tpot]
    both = sum(map(all, zip(in_ttft, in_itl, strict=True)))

    def share(held: int) -> float | None:
        return round(held / total, 4) if total else None

    return {
        "ttft_ms": limits.ttft_ms,
        "itl_ms": limits.itl_ms,
        "ttft_attained": share(sum(in_ttft)) if limits.ttft_ms else None,
        "itl_attained": share(sum(in_itl)) if limits.itl_ms else None,
        "attained": share(both) if limits.ttft_ms or limits.itl_ms else None,
    }


def _replicas(outcome: Outcome) -> dict[str, Any]:
    history, end_s = outcome.replica_counts, outcome.end_s
    ends = [count.time_s for count in history[1:]] + [max(end_s, history[-1].time_s)]
    spans = [max(0.0, min(end, end_s) - min(c.time_s, end_s)) for c, end in zip(history, ends, strict=True)]
    replica_s = sum(count.total * span for count, span in zip(history, spans, strict=True))
    devices = outcome.simulation.replica.num_devices
    return {
        "least": min(count.running for count in history),
        "most": max(count.running for count in history),
        "mean": round(replica_s / end_s, 3) if end_s else float(history[0].total),
        "gpu_hours": round(replica_s * devices / _HOUR_S, 4),
        "over_time": [[round(c.time_s, 3), c.running, c.starting, c.draining] for c in history],
    }


def _most_devices(outcome: Outcome) -> int:
    return max(count.total for count in outcome.replica_counts) * outcome.simulation.replica.num_devices


def _rate(count: float, seconds: float) -> float:
    return round(count / seconds, 3) if seconds else 0.0
