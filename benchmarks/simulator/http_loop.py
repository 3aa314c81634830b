"""A closed loop of clients over HTTP, beside simulator and `plan`: whether requests that began together stay so."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from operator import sub
from typing import Any

from benchmarks.simulator.http_agreement import (
    LENGTHS,
    compared,
    modelled_service,
    request_overhead,
    simulated,
    with_overhead,
)
from benchmarks.simulator.http_run import GivenLoop, Seen, bench
from benchmarks.simulator.paced_gpu import LIMITS, modelled
from cluster.planning import clients as planning
from cluster.planning.cost_model import CostModel
from cluster.planning.walk import StepRules, prompts_at_once
from cluster.simulation.arrivals import PoissonArrivals, Request

LOOPS = ((8.0, 32, 4), (2.0, 8, 12), (1.0, 8, 24))
_SAME_STEP_S = 0.003  # on the GPU, a third of a step: first tokens that are as close as this are of one step


def closed_loop(slower: float, clients: int, each: int) -> list[dict[str, Any]]:
    """A row for each kind of lengths: simulated and planned figures over real ones."""
    rows = []
    with modelled_service(slower) as service:
        overhead_s = request_overhead(service.url, modelled(slower))
        cost = with_overhead(modelled(slower), overhead_s)
        for name, lengths in LENGTHS.items():
            drawn = list(PoissonArrivals((1000.0,), 10.0, *lengths))[: clients * each]
            requests = [replace(request, arrival_s=0.0) for request in drawn]
            seen = bench(service.url, requests, clients)
            outcome = simulated(cost, GivenLoop(clients, requests))
            recorder = outcome.recorder
            mean_ms = statistics.fmean(seen.ttfts_ms)
            simulated_ms = 1e3 * (
                overhead_s + statistics.fmean(map(sub, recorder.first_tokens_s, recorder.arrivals_s))
            )
            rows.append(
                {
                    "slower": slower,
                    "clients": clients,
                    "lengths": name,
                    "requests": len(requests),
                    "request_overhead_ms": round(1e3 * overhead_s, 1),
                    "ttft_mean_ms": round(mean_ms, 1),
                    "simulated_ttft_mean_ms": round(simulated_ms / mean_ms, 3),
                    **compared(seen, outcome),
                    **together("", seen.first_s, clients, slower),
                    **together("simulated_", recorder.first_tokens_s, clients, slower),
                    **(planned(cost, clients, each, requests[0], seen) if name == "fixed" else {}),
                }
            )
            print(rows[-1], flush=True)
    return rows


def together(prefix: str, firsts_s: Sequence[float], clients: int, slower: float) -> dict[str, float]:
    """How many requests got their first token in the same step, on average over the requests of the first round, and
    over those of the second half."""
    ordered = sorted(firsts_s)
    begin, last = ordered[:clients], ordered[len(ordered) // 2 :]
    sizes = [group_size(times, slower * _SAME_STEP_S) for times in (begin, last)]
    return dict(zip((f"{prefix}together_first", f"{prefix}together_late"), sizes, strict=True))


def group_size(ordered: Sequence[float], gap_s: float) -> float:
    """The size of the group of each time, on average over the times; more than `gap_s` ends a group."""
    sizes, size = [], 1
    for before, after in pairwise(ordered):
        if after - before > gap_s:
            sizes.append(size)
            size = 0
        size += 1
    sizes.append(size)
    return round(statistics.fmean(size for size in sizes for _ in range(size)), 2)


def planned(cost: CostModel, clients: int, each: int, first: Request, seen: Seen) -> dict[str, float]:
    """TTFT of `plan --concurrency` over what was seen, and of the same walk without its limit of prompts in a step."""
    load = planning.Workload(first.input_len, first.output_len)
    mean_ms = statistics.fmean(seen.ttfts_ms)
    found = {}
    for name, most in (("planned", prompts_at_once(clients, load.output_len)), ("in_step", None)):
        rules = StepRules(LIMITS.max_num_batched_tokens, LIMITS.max_num_seqs, 1 << 16, most)
        latencies = planning.closed_loop(cost, rules, load, clients, each)
        found[f"{name}_ttft_mean"] = round(1e3 * latencies.ttft_s / mean_ms, 3)
        found[f"{name}_itl"] = round(1e3 * latencies.itl_s / statistics.fmean(seen.tpots_ms), 3)
    return found
