"""`qwen3-dist plan`: predicted memory and speed of every layout on a cluster, best first."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from qwen3_dist.step_defaults import STEP_DEFAULTS
from serve_app.cli.options import add_model_and_cluster, changed_config, given_cluster

if TYPE_CHECKING:
    from cluster.hardware import Cluster
    from cluster.planning.planner import PlannedLayout, PlanRequest

HELP = "compare all layouts of a model on a cluster by predicted memory, TTFT, ITL and throughput"
NOTHING_FITS = 2
_LEGEND = (
    "*          best: most tokens/s/GPU among the layouts within --ttft-ms and --itl-ms",
    "replicas   engines of this layout that fill the cluster and share the load",
    "weights, KV, activations   memory of the fullest rank, with the KV cache that this load uses",
    "max batch  sequences of this load that fit into the KV cache of one replica",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cpu, gpu = (STEP_DEFAULTS[kind].max_num_batched_tokens for kind in ("cpu", "cuda"))
    add_model_and_cluster(parser)
    for name, what in (
        ("input-len", "tokens in each prompt"),
        ("output-len", "tokens generated for each prompt"),
        ("concurrency", "requests in flight in the whole cluster"),
    ):
        parser.add_argument(f"--{name}", type=int, required=True, metavar="N", help=what)
    parser.add_argument(
        "--ttft-ms", type=float, metavar="X", help="upper limit of the mean time to first token"
    )
    parser.add_argument(
        "--itl-ms", type=float, metavar="X", help="upper limit of the mean inter-token latency"
    )
    parser.add_argument(
        "--max-num-batched-tokens",
        type=int,
        metavar="N",
        help=f"most tokens in one step (default: {gpu}; {cpu} on CPU)",
    )
    parser.add_argument(
        "--expert-imbalance",
        type=float,
        metavar="X",
        help="load of the busiest expert-parallel rank over the mean (default: 1.2)",
    )
    parser.add_argument(
        "--all", action="store_true", help="also list layouts that do not fit, as --json always does"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="chart of throughput per GPU over speed per user"
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    from cluster.planning.planner import check_limits, plan

    name, config = changed_config(args)
    cluster = given_cluster(args)
    request = _request(args, cluster)
    if args.plot:
        from cluster.planning.plots import require_matplotlib

        require_matplotlib()
    planned = plan(config, cluster, request)
    check_limits(planned, request)
    if args.plot:
        from cluster.planning.planner import at_all_loads
        from cluster.planning.plots import plot_plan

        where = f"{cluster.num_devices} x {cluster.device.name}"
        load = f"{request.input_len} tokens in, {request.output_len} out"
        plot_plan(args.plot, f"{name} on {where}: {load}", at_all_loads(config, cluster, request))
    if args.json:
        print("\n".join(json.dumps(one.as_json()) for one in planned), file=out)
    else:
        print("\n".join(_report(args, planned, request, cluster)), file=out)
    if not planned[0].fits:
        print(f"qwen3-dist: no layout of {name} fits; {_advice(planned, cluster)}", file=sys.stderr)
        return NOTHING_FITS
    return 0


def _request(args: argparse.Namespace, cluster: Cluster) -> PlanRequest:
    from cluster.planning.planner import PlanRequest

    names = [field.name for field in dataclasses.fields(PlanRequest)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    given.setdefault("max_num_batched_tokens", STEP_DEFAULTS[cluster.device_kind].max_num_batched_tokens)
    return PlanRequest(**given)


def _advice(planned: list[PlannedLayout], cluster: Cluster) -> str:
    smallest = min(
        (one for one in planned if one.bytes_per_rank), key=lambda one: sum(one.bytes_per_rank.values())
    )
    if smallest.reason.startswith("the cache"):
        return (
            f"with {smallest.layout}, {smallest.reason}; lower --input-len and --output-len or take more GPUs"
        )
    return (
        f"with {smallest.layout}, which needs least, {smallest.reason}; take larger GPUs or more "
        f"than {cluster.num_devices}"
    )


def _report(
    args: argparse.Namespace, planned: list[PlannedLayout], request: PlanRequest, cluster: Cluster
) -> list[str]:
    """The table, its legend, and the command that serves the best layout."""
    shown = planned if args.all else [one for one in planned if one.fits]
    legend = _LEGEND if planned[0].meets_limits(request) else _LEGEND[1:]
    lines = [*_table(shown, request), "", *legend] if shown else []
    if shown and len(shown) < len(planned):
        lines.append(f"{len(planned) - len(shown)} layouts that do not fit are left out; --all lists them.")
    best = planned[0]
    if best.fits:
        multi_node = cluster.num_devices > cluster.devices_per_node
        lines += ["", "To serve the best layout:", f"  {_serve_line(args, best, multi_node)}"]
        if multi_node:
            lines.append("  after `ray start` on every node, with the model's files at the same path on each")
    return lines


def _serve_line(args: argparse.Namespace, best: PlannedLayout, multi_node: bool) -> str:
    words = ["qwen3-dist", "serve", args.model or "bundled", "--layout", str(best.layout)]
    if best.replicas > 1:
        words += ["--min-replicas", str(best.replicas), "--max-replicas", str(best.replicas)]
    if args.hf_overrides:
        words += ["--hf-overrides", args.hf_overrides]
    if args.quantize != "none":
        words += ["--quantize", args.quantize]
    if args.kv_cache_dtype != "auto":
        words += ["--kv-cache-dtype", args.kv_cache_dtype]
    if args.max_num_batched_tokens is not None:
        words += ["--max-num-batched-tokens", str(args.max_num_batched_tokens)]
    return shlex.join([*words, "--ray-address", "auto"] if multi_node else words)


def _table(planned: list[PlannedLayout], request: PlanRequest) -> list[str]:
    """A row for each layout. The best is marked with *; the last column says why a layout does not fit or which limit
    it exceeds."""
    header = ("", "layout", "ranks", "replicas", "weights", "KV", "activations", "max batch")
    rows: list[tuple[str, ...]] = [(*header, "TTFT ms", "ITL ms", "tokens/s", "tokens/s/GPU", "")]
    for place, one in enumerate(planned):
        sizes = [f"{value / 1e9:.2f} GB" for value in one.bytes_per_rank.values()] or ["-"] * 3
        speeds = (one.ttft_ms, one.itl_ms, one.tokens_per_s, one.tokens_per_s_per_gpu)
        best = place == 0 and one.meets_limits(request)
        note = one.reason or _exceeded_limits(one, request)
        rows.append(
            (
                "*" if best else "",
                str(one.layout),
                str(one.layout.world),
                str(one.replicas),
                *sizes,
                str(one.max_batch) if one.fits else "-",
                *("-" if speed is None else f"{speed:,.1f}" for speed in speeds),
                note,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header) + 5)]
    return [
        "  ".join(
            cell.ljust(width) if column in (0, 1, len(widths) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _exceeded_limits(one: PlannedLayout, request: PlanRequest) -> str:
    limits = (("TTFT", one.ttft_ms, request.ttft_ms), ("ITL", one.itl_ms, request.itl_ms))
    return ", ".join(
        f"{name} over {limit:g} ms" for name, value, limit in limits if limit and value and value > limit
    )
