"""The layout that `qwen3-dist simulate` takes if none is given: the best that `plan` finds for the same load."""

from __future__ import annotations

import argparse
from statistics import fmean
from typing import TYPE_CHECKING

from qwen3_dist.layout import Layout
from qwen3_dist.step_defaults import STEP_DEFAULTS

if TYPE_CHECKING:
    from cluster.hardware import Cluster
    from cluster.planning.planner import PlanRequest
    from qwen3_dist.config import ModelConfig

GIVEN = "given"


def layout_and_reason(args: argparse.Namespace, config: ModelConfig, cluster: Cluster) -> tuple[Layout, str]:
    """The layout to simulate and why it is taken. Of a load that is not complete, tp=1: another check says what is
    missing. Raises ConfigError, and ParallelLayoutError for a layout that is given."""
    from cluster.planning.fleet import all_under
    from cluster.planning.planner import plan

    if args.layout:
        return Layout.parse(args.layout), GIVEN
    load = _load(args, cluster)
    if load is None:
        return Layout(), GIVEN
    request, rate = load
    if rate is None:
        layout, amount = plan(config, cluster, request)[0].layout, f"{request.concurrency} clients"
    else:
        layout, amount = all_under(config, cluster, request, rate)[0].planned.layout, f"{rate:.3g} requests/s"
    lengths = f"{request.input_len} + {request.output_len} tokens"
    return layout, f"the best by `plan` for {amount} of {lengths}; give --layout to take another"


def _load(args: argparse.Namespace, cluster: Cluster) -> tuple[PlanRequest, float | None] | None:
    """What to plan for, and the highest rate if there is one; None if options are missing."""
    from cluster.planning.experts import EXPERT_IMBALANCE
    from cluster.planning.planner import PlanRequest
    from cluster.simulation.arrivals import Lengths
    from cluster.simulation.trace import read_trace

    rate: float | None = None
    if args.trace is not None:
        trace = read_trace(args.trace)
        inputs, outputs = (
            fmean(getattr(each, name) for each in trace) for name in ("input_len", "output_len")
        )
        rate = len(trace) / max(1.0, trace[-1].arrival_s)
    elif args.input_len is None or args.output_len is None or not (args.rate or args.concurrency):
        return None
    else:
        inputs, outputs = Lengths.parse(args.input_len).mean, Lengths.parse(args.output_len).mean
        rate = max(args.rate) if args.rate else None
        if rate is not None and rate <= 0:
            return None
    tokens = args.max_num_batched_tokens or STEP_DEFAULTS[cluster.device_kind].max_num_batched_tokens
    request = PlanRequest(
        max(1, round(inputs)),
        max(1, round(outputs)),
        args.concurrency or 1,
        args.ttft_ms,
        args.itl_ms,
        tokens,
        EXPERT_IMBALANCE if args.expert_imbalance is None else args.expert_imbalance,
        args.kv_cache_dtype,
        min(1.0, args.prefix_len / inputs) if args.prefixes else 0.0,
    )
    return request, rate
