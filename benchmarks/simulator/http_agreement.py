"""The simulator and `plan` beside a real service over HTTP, with the steps of a modelled GPU (`paced_gpu`)."""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.simulator.http_run import GivenLoop, Seen, bench
from benchmarks.simulator.paced_gpu import (
    BLOCK_SIZE,
    LIMITS,
    NUM_BLOCKS,
    SLOWER,
    SLOWER_TIMES,
    ModelledReplica,
    modelled,
    settings,
    simulated_replica,
)
from cluster.planning.cost_model import CostModel
from cluster.planning.dp_groups import step_seconds
from cluster.planning.layout_loads import LayoutLoads
from cluster.planning.planner import PlanRequest
from cluster.planning.walk import Request as WalkRequest
from cluster.planning.walk import StepRules, Walk
from cluster.simulation.arrivals import Lengths, PoissonArrivals, Request
from cluster.simulation.report import Limits, summarize
from cluster.simulation.service import ServiceSimulation, simulate
from qwen3_dist.percentiles import percentile
from serve_app import app
from serve_app.launch.foreground import RunningService, running_service
from serve_app.settings import read_service_config

SHARES = (0.3, 0.6, 0.9)  # of capacity
LENGTHS = {
    "fixed": (Lengths(512), Lengths(64)),
    "spread": (Lengths(512, 0.5), Lengths(64, 0.5)),
}
SECONDS = 40.0  # of arrivals at each load
OVERHEAD_REQUESTS = 24
FIGURES = ("ttft_p50_ms", "ttft_p90_ms", "itl_p50_ms", "tokens_per_s")


@contextlib.contextmanager
def modelled_service(slower: float, **scaling: Any) -> Iterator[RunningService]:
    """A context with a running service whose steps are those of the GPU, `slower` times as long."""
    before = app.EngineReplica
    os.environ[SLOWER] = str(slower)
    app.EngineReplica = ModelledReplica  # type: ignore[misc]
    try:
        with running_service(read_service_config(settings(**scaling))) as service:
            yield service
    finally:
        app.EngineReplica = before  # type: ignore[misc]
        del os.environ[SLOWER]


def open_loads(
    slower: float = SLOWER_TIMES, seconds: float = SECONDS, shares: Sequence[float] = SHARES
) -> list[dict[str, Any]]:
    """A row for each kind of lengths and each share of the capacity: simulated and planned figures over real ones."""
    rows = []
    with modelled_service(slower) as service:
        overhead_s = request_overhead(service.url, modelled(slower))
        cost = with_overhead(modelled(slower), overhead_s)
        for name, lengths in LENGTHS.items():
            for share in shares:
                rate = share * capacity(cost, *lengths)
                requests = list(PoissonArrivals((rate,), seconds, *lengths, seed=int(10 * share)))
                seen = bench(service.url, requests)
                rows.append(
                    {
                        "lengths": name,
                        "load": share,
                        "requests": len(requests),
                        "request_overhead_ms": round(1e3 * overhead_s, 1),
                        **compared(seen, simulated(cost, seen.requests)),
                        **walked(cost, seen),
                        **(planned(cost, rate, seen) if name == "fixed" else {}),
                    }
                )
                print(rows[-1], flush=True)
    return rows


def request_overhead(url: str, cost: CostModel) -> float:
    """Seconds of HTTP and text for a request: what one client at a time waits longer than the step of its prompt.

    The median of requests that come one by one.
    """
    requests = [Request(0.0, 512, 4)] * OVERHEAD_REQUESTS
    seen = bench(url, requests, concurrency=1)
    [alone] = simulated(cost, requests[:1]).recorder.first_tokens_s
    return statistics.median(seen.ttfts_ms) / 1e3 - alone


def with_overhead(cost: CostModel, overhead_s: float) -> CostModel:
    return CostModel(cost.config, cost.layout, replace(cost.cluster, request_overhead_s=overhead_s))


def capacity(cost: CostModel, inputs: Lengths, outputs: Lengths) -> float:
    """Requests a second of a service that is never idle, by the simulation."""
    arrivals = PoissonArrivals((400.0,), 1.0, inputs, outputs)
    requests = [replace(request, arrival_s=0.0) for request in arrivals]
    outcome = simulated(cost, requests)
    return len(requests) / outcome.end_s


def simulated(cost: CostModel, requests: Any, **changes: Any) -> Any:
    overhead_s = cost.cluster.request_overhead_s
    simulation = ServiceSimulation(simulated_replica(), request_overhead_s=overhead_s, **changes)
    given = requests if isinstance(requests, GivenLoop) else sorted(requests, key=lambda each: each.arrival_s)
    return simulate(simulation, cost, given)


def compared(seen: Seen, outcome: Any) -> dict[str, Any]:
    """Real figures, and simulated over real."""
    report = summarize(outcome, Limits())
    found = {
        "ttft_p50_ms": report["ttft_ms"]["p50"],
        "ttft_p90_ms": report["ttft_ms"]["p90"],
        "itl_p50_ms": report["itl_ms"]["p50"],
        "tokens_per_s": report["output_tokens_per_s"],
    }
    real = seen.figures()
    ratios = {f"simulated_{name}": round(found[name] / real[name], 3) for name in FIGURES}
    return {**{name: round(real[name], 1) for name in FIGURES}, **ratios}


def walked(cost: CostModel, seen: Seen) -> dict[str, float]:
    """TTFT of the walk behind `plan`, of the same arrivals, over what was seen."""
    rules = StepRules(LIMITS.max_num_batched_tokens, LIMITS.max_num_seqs, NUM_BLOCKS * BLOCK_SIZE)
    sent = (WalkRequest(each.input_len, each.output_len, each.arrival_s) for each in seen.requests)
    served = Walk(step_seconds(cost), rules).serve(sent)
    ttfts = sorted(1e3 * (each.ttft_s + cost.cluster.request_overhead_s) for each in served)
    real = seen.figures()
    return {
        f"walked_ttft_p{percent}_ms": round(percentile(ttfts, percent) / real[f"ttft_p{percent}_ms"], 3)
        for percent in (50, 90)
    }


def planned(cost: CostModel, rate: float, seen: Seen) -> dict[str, float]:
    """Means that `plan --rate` says of equal requests, over those that were seen."""
    first = seen.requests[0]
    sizes = first.input_len, first.output_len
    request = PlanRequest(*sizes, concurrency=1, max_num_batched_tokens=LIMITS.max_num_batched_tokens)
    plan = LayoutLoads(cost.config, cost.layout, cost.cluster, request).under(rate).planned
    assert plan.ttft_ms and plan.itl_ms
    return {
        "planned_ttft_mean_ms": round(plan.ttft_ms / statistics.fmean(seen.ttfts_ms), 3),
        "planned_itl_mean_ms": round(plan.itl_ms / statistics.fmean(seen.tpots_ms), 3),
    }
