"""Autoscaling from 1 to 3 replicas over HTTP under a rate that rises and falls, beside the simulator."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from ray import serve

from benchmarks.simulator.http_agreement import (
    modelled_service,
    request_overhead,
    simulated,
    with_overhead,
)
from benchmarks.simulator.http_run import Seen, bench
from benchmarks.simulator.paced_gpu import SLOWER_TIMES, modelled
from cluster.simulation.arrivals import Lengths, PoissonArrivals
from cluster.simulation.autoscaler import AutoscalingConfig
from cluster.simulation.report import Limits, summarize
from cluster.simulation.service import ReplicaCount
from serve_app.settings import REPLICA

SCALING = AutoscalingConfig(
    min_replicas=1,
    max_replicas=3,
    target_ongoing_requests=8.0,
    upscale_delay_s=3.0,
    downscale_delay_s=8.0,
    metrics_interval_s=1.0,
    look_back_period_s=5.0,
)
RATES = (1.0, 4.0, 1.0)  # requests a second, one third of the time each
LENGTHS = Lengths(512, 0.5), Lengths(64, 0.5)
LIMITS = Limits(ttft_ms=400.0, itl_ms=90.0)
SECONDS = 90.0
_POLL_S = 0.5


def scaling(slower: float = SLOWER_TIMES, seconds: float = SECONDS) -> list[dict[str, Any]]:
    """A row of replicas and SLO attainment of the real service, and simulated over real."""
    with modelled_service(slower, **asdict(SCALING)) as service:
        overhead_s = request_overhead(service.url, modelled(slower))
        requests = list(PoissonArrivals(RATES, seconds, *LENGTHS))
        with watched_replicas() as counts:
            seen = bench(service.url, requests)
    history = [
        ReplicaCount(count.time_s - seen.began_s, count.running, count.starting, count.draining)
        for count in counts
    ]
    start_up_s = statistics.fmean(start_ups(history))
    cost = with_overhead(modelled(slower), overhead_s)
    outcome = simulated(cost, seen.requests, autoscaling=SCALING, start_up_s=start_up_s)
    report = summarize(outcome, LIMITS)
    end_s = max(seen.last_s)
    real_slo, our_slo = attained(seen), report["slo"]["attained"]
    row = {
        "requests": len(requests),
        "request_overhead_ms": round(1e3 * overhead_s, 1),
        "start_up_s": round(start_up_s, 1),
        **replicas_compared(history, outcome.replica_counts, end_s),
        "slo_attained": round(real_slo, 3),
        "simulated_slo_attained": round(our_slo / real_slo, 3),
        "over_time": [[round(c.time_s, 1), c.running, c.starting, c.draining] for c in changes(history)],
        "simulated_over_time": report["replicas"]["over_time"],
    }
    print(row, flush=True)
    return [row]


def attained(seen: Seen) -> float:
    """The share of requests within both limits."""
    assert LIMITS.ttft_ms and LIMITS.itl_ms
    pairs = zip(seen.ttfts_ms, seen.tpots_ms, strict=True)
    return statistics.fmean(ttft <= LIMITS.ttft_ms and tpot <= LIMITS.itl_ms for ttft, tpot in pairs)


@contextmanager
def watched_replicas() -> Iterator[list[ReplicaCount]]:
    """A context in which the replicas are counted twice a second, at times of this machine's clock."""
    counts: list[ReplicaCount] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(_POLL_S):
            states = _states()
            running, starting, stopping = (
                states.get(name, 0) for name in ("RUNNING", "STARTING", "STOPPING")
            )
            counts.append(ReplicaCount(time.perf_counter(), running, starting, stopping))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield counts
    finally:
        stop.set()
        thread.join()


def _states() -> dict[str, int]:
    for application in serve.status().applications.values():
        if REPLICA in application.deployments:
            return {
                str(name): count for name, count in application.deployments[REPLICA].replica_states.items()
            }
    return {}


def changes(history: list[ReplicaCount]) -> list[ReplicaCount]:
    """The counts that differ from those before them."""
    kept: list[ReplicaCount] = []
    for count in history:
        if not kept or replace(count, time_s=0) != replace(kept[-1], time_s=0):
            kept.append(count)
    return kept


def start_ups(history: list[ReplicaCount]) -> list[float]:
    """Seconds that each replica took to start, in order: the n-th that began is taken to be the n-th that ran."""
    began: list[float] = []
    took: list[float] = []
    for before, after in zip(history, history[1:], strict=False):
        ready = max(0, after.running - before.running)
        for _ in range(ready):
            took.append(after.time_s - (began.pop(0) if began else before.time_s))
        began += [after.time_s] * max(0, after.starting - before.starting + ready)
    return took


def replicas_compared(
    real: list[ReplicaCount], simulated: list[ReplicaCount], end_s: float
) -> dict[str, float]:
    """Means over time of the replicas that run, and of how much they differ."""
    times = [end_s * (index + 0.5) / 1000 for index in range(1000)]
    ours, theirs = ([_at(history, at).running for at in times] for history in (simulated, real))
    mean = statistics.fmean(theirs)
    return {
        "mean_replicas": round(mean, 2),
        "simulated_mean_replicas": round(statistics.fmean(ours) / mean, 3),
        "mean_difference": round(
            statistics.fmean(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / mean, 3
        ),
    }


def _at(history: list[ReplicaCount], at_s: float) -> ReplicaCount:
    return next((count for count in reversed(history) if count.time_s <= at_s), history[0])
