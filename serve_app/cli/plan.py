"""`qwen3-dist plan`: every layout of a cluster with its memory and predicted speed, the best marked."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from serve_app.cli.options import add_model_and_cluster, given_cluster

if TYPE_CHECKING:
    from cluster.hardware import Cluster
    from cluster.planner import PlannedLayout, PlanRequest

HELP = "compare all layouts of a model on a cluster: memory, TTFT, ITL and throughput as predicted"
NOTHING_FITS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_and_cluster(parser)
    for name, what in (
        ("input-len", "tokens of each prompt"),
        ("output-len", "tokens generated from each"),
        ("concurrency", "requests in flight in the whole cluster"),
    ):
        parser.add_argument(f"--{name}", type=int, required=True, metavar="N", help=what)
    parser.add_argument("--ttft-ms", type=float, metavar="X", help="longest mean time to the first token")
    parser.add_argument("--itl-ms", type=float, metavar="X", help="longest mean time between two tokens")
    parser.add_argument(
        "--max-num-batched-tokens",
        type=int,
        metavar="N",
        help="most tokens of a step (default: 8192, on a shared host 1024)",
    )
    parser.add_argument(
        "--expert-imbalance",
        type=float,
        metavar="X",
        help="load of the busiest expert rank over the mean (default: 1.2)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="chart of throughput over user speed")


def run(args: argparse.Namespace, out: TextIO) -> int:
    from cluster.official import find_config
    from cluster.planner import check_limits, plan

    name, config = find_config(args.model)
    cluster = given_cluster(args)
    request = _request(args, cluster)
    if args.plot:
        from cluster.plots import require_matplotlib

        require_matplotlib()
    planned = plan(config, cluster, request)
    check_limits(planned, request)
    if args.plot:
        from cluster.planner import at_all_loads
        from cluster.plots import plot_plan

        where = f"{cluster.num_devices} x {cluster.device.name}"
        load = f"{request.input_len} tokens in, {request.output_len} out"
        plot_plan(args.plot, f"{name} on {where}: {load}", at_all_loads(config, cluster, request))
    if args.json:
        print("\n".join(json.dumps(one.as_json()) for one in planned), file=out)
    else:
        print("\n".join(_table(planned, request)), file=out)
    if not planned[0].fits:
        print(f"qwen3-dist: no layout of {name} fits; {_way_out(planned, cluster)}", file=sys.stderr)
        return NOTHING_FITS
    return 0


def _request(args: argparse.Namespace, cluster: Cluster) -> PlanRequest:
    from cluster.planner import PlanRequest

    names = [field.name for field in dataclasses.fields(PlanRequest)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if cluster.shared_host:
        given.setdefault("max_num_batched_tokens", 1024)
    return PlanRequest(**given)


def _way_out(planned: list[PlannedLayout], cluster: Cluster) -> str:
    least = min(
        (one for one in planned if one.bytes_per_rank), key=lambda one: sum(one.bytes_per_rank.values())
    )
    if least.reason.startswith("the cache"):
        return f"of {least.layout} {least.reason}; lower --input-len and --output-len or take more GPUs"
    return (
        f"of {least.layout}, the least, {least.reason}; take more or larger GPUs than {cluster.num_devices}"
    )


def _table(planned: list[PlannedLayout], request: PlanRequest) -> list[str]:
    """The best is marked with *; what breaks a limit or does not fit says so in its last column."""
    header = ("", "layout", "ranks", "replicas", "weights", "KV", "activations", "max batch")
    rows: list[tuple[str, ...]] = [(*header, "TTFT ms", "ITL ms", "tokens/s", "tokens/s/GPU", "")]
    for place, one in enumerate(planned):
        sizes = [f"{value / 1e9:.2f} GB" for value in one.bytes_per_rank.values()] or ["-"] * 3
        speeds = (one.ttft_ms, one.itl_ms, one.tokens_per_s, one.tokens_per_s_per_gpu)
        best = place == 0 and one.holds(request)
        note = one.reason or ("" if one.holds(request) else "breaks a limit")
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
