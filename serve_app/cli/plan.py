"""`qwen3-dist plan`: predicted memory and speed of every layout on a cluster, best first, and what follows from it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from qwen3_dist.errors import ConfigError
from qwen3_dist.step_defaults import STEP_DEFAULTS
from serve_app.cli import plan_deployment
from serve_app.cli.options import add_model_and_cluster, changed_config, number
from serve_app.cli.plan_answers import breaks_first, breaks_line, cost_line
from serve_app.cli.plan_kinds import Choice, best_on, choice_lines, choices
from serve_app.cli.plan_table import layout_lines

if TYPE_CHECKING:
    from cluster.hardware import Cluster
    from cluster.planning.gpu_kinds import GpuKind
    from cluster.planning.planner import PlanRequest
    from qwen3_dist.config import ModelConfig

HELP = "compare layouts and GPUs for a model by predicted memory, TTFT, ITL, throughput and cost"
NOTHING_FITS = 2
_GPUS = (
    "number and kind of GPUs, on nodes of 8, or nodes x GPUs of each x kind; a kind alone, as H100, finds the fewest "
    "that serve --rate; H100,H200 or 8xH100,4xH200 compares kinds"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_and_cluster(parser, gpus_help=_GPUS)
    _add_load(parser.add_argument_group("load"))
    _add_engine(parser.add_argument_group("engine of each replica"))
    parser.add_argument(
        "--price",
        metavar="P|KIND=P,...|FILE.yaml",
        help="price of a GPU-hour: 2.5 of the one kind, H100=2.5,H200=3.5, or a file with a line `H100: 2.5` each",
    )
    parser.add_argument(
        "--all", action="store_true", help="also list layouts that do not fit, as --json always does"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="chart of throughput per GPU over speed per user"
    )
    plan_deployment.add_arguments(parser)


def _add_load(group: argparse._ArgumentGroup) -> None:
    for name, what in (
        ("input-len", "tokens in each prompt"),
        ("output-len", "tokens generated for each prompt"),
        ("concurrency", "requests in flight in the whole cluster, each replaced when it ends"),
    ):
        group.add_argument(f"--{name}", type=int, metavar="N", help=what)
    group.add_argument(
        "--rate",
        type=number(0, above=True),
        metavar="R",
        help="requests a second that arrive, in place of --concurrency",
    )
    group.add_argument(
        "--ttft-ms", type=float, metavar="X", help="upper limit of the mean time to first token"
    )
    group.add_argument(
        "--itl-ms", type=float, metavar="X", help="upper limit of the mean inter-token latency"
    )


def _add_engine(group: argparse._ArgumentGroup) -> None:
    cpu, gpu = (STEP_DEFAULTS[kind].max_num_batched_tokens for kind in ("cpu", "cuda"))
    group.add_argument(
        "--max-num-batched-tokens",
        type=int,
        metavar="N",
        help=f"most tokens in one step (default: {gpu}; {cpu} on CPU)",
    )
    group.add_argument(
        "--expert-imbalance",
        type=float,
        metavar="X",
        help="load of the busiest expert-parallel rank over the mean (default: 1.2)",
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    _check(args)
    name, config = changed_config(args)
    kinds = _kinds(args)
    request = _request(args, kinds[0].cluster)
    prices = _prices(args, kinds)
    if args.plot:
        from cluster.planning.plots import require_matplotlib

        require_matplotlib()
    if len(kinds) > 1 or not kinds[0].sized:
        found = choices(config, kinds, request, args.rate, prices)
        rows = [{**one.as_json(), "breaks_first": None} for one in found]
        _print(args, config, request, found[0], choice_lines(found), rows, out)
        return 0
    best = best_on(config, kinds[0], request, args.rate, prices)
    if args.plot:
        _plot(args.plot, name, config, best, request)
    table = layout_lines(best.planned, request, args.all, best.rated)
    if best.planned[0].fits:
        _print(args, config, request, best, table, _rows(best, prices), out)
        return 0
    print("\n".join(map(json.dumps, _rows(best, prices)) if args.json else table), file=out)
    print(f"qwen3-dist: no layout of {name} fits; {_advice(best)}", file=sys.stderr)
    return NOTHING_FITS


def _print(
    args: argparse.Namespace,
    config: ModelConfig,
    request: PlanRequest,
    best: Choice,
    table: list[str],
    rows: list[dict[str, Any]],
    out: TextIO,
) -> None:
    """The plan, and the file of --render: to stdout in place of the plan, or to --out."""
    cluster = best.cluster
    settings = plan_deployment.settings(args, cluster, request, best.planned[0])
    if args.render:
        plan_deployment.write(plan_deployment.rendered(args.render, settings, cluster), args.out, out)
        if args.out is None:
            return
    breaks = breaks_first(config, cluster, request, best.planned)
    if args.json:
        rows[0]["breaks_first"] = breaks
        print("\n".join(map(json.dumps, rows)), file=out)
        return
    multi_node = cluster.num_devices > cluster.devices_per_node
    answers = [line for line in (breaks_line(breaks), cost_line(best.cost)) if line]
    print("\n".join([*table, "", *answers, "", *plan_deployment.serve_lines(settings, multi_node)]), file=out)


def _rows(best: Choice, prices: Mapping[str, float]) -> list[dict[str, Any]]:
    """The objects of --json, one for each layout."""
    from cluster.planning.prices import costs

    rows: list[dict[str, Any]] = []
    for place, one in enumerate(best.planned):
        row = best.rated[place].as_json() if best.rated else one.as_json()
        cost = costs(best.cluster, one.tokens_per_s or 0.0, prices.get(best.kind))
        rows.append({**row, "cost": cost, "breaks_first": None})
    return rows


def _check(args: argparse.Namespace) -> None:
    """Raises ConfigError for options that are missing or contradict each other."""
    missing = [
        f"--{name}" for name in ("input-len", "output-len") if getattr(args, name.replace("-", "_")) is None
    ]
    if args.concurrency is None and args.rate is None:
        missing.append("--concurrency or --rate")
    if missing:
        raise ConfigError(f"the following arguments are required: {', '.join(missing)}")
    if args.concurrency is not None and args.rate is not None:
        raise ConfigError("--concurrency and --rate are two ways to say what load comes; leave one out")
    if args.out is not None and not args.render:
        raise ConfigError(
            "--out is the file of --render; add --render serve, kuberay or slurm, or leave --out out"
        )


def _kinds(args: argparse.Namespace) -> list[GpuKind]:
    from cluster.hardware import read_cluster
    from cluster.planning.gpu_kinds import GpuKind, parse_kinds

    kinds = [GpuKind(read_cluster(args.cluster))] if args.cluster else parse_kinds(args.gpus)
    if not kinds[0].sized and args.rate is None:
        raise ConfigError(
            f"--gpus {args.gpus} has no number of GPUs; write 8x{kinds[0].name}, or give --rate to find the fewest"
        )
    if args.plot and (len(kinds) > 1 or not kinds[0].sized):
        raise ConfigError("--plot draws the layouts of one cluster; give --gpus one kind with a number")
    return kinds


def _prices(args: argparse.Namespace, kinds: list[GpuKind]) -> dict[str, float]:
    from cluster.planning.prices import read_prices

    return read_prices(args.price, [kind.name for kind in kinds]) if args.price is not None else {}


def _request(args: argparse.Namespace, cluster: Cluster) -> PlanRequest:
    from cluster.planning.planner import PlanRequest

    names = [field.name for field in dataclasses.fields(PlanRequest)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    given.setdefault("max_num_batched_tokens", STEP_DEFAULTS[cluster.device_kind].max_num_batched_tokens)
    given.setdefault("concurrency", 1)  # a rate says how many
    return PlanRequest(**given)


def _plot(file: Path, name: str, config: ModelConfig, best: Choice, request: PlanRequest) -> None:
    from cluster.planning.planner import at_all_loads
    from cluster.planning.plots import plot_plan

    request = dataclasses.replace(request, concurrency=best.planned[0].concurrency)
    where = f"{best.cluster.num_devices} x {best.kind}"
    load = f"{request.input_len} tokens in, {request.output_len} out"
    plot_plan(file, f"{name} on {where}: {load}", at_all_loads(config, best.cluster, request))


def _advice(best: Choice) -> str:
    smallest = min(
        (one for one in best.planned if one.bytes_per_rank), key=lambda one: sum(one.bytes_per_rank.values())
    )
    if smallest.reason.startswith("the cache"):
        return (
            f"with {smallest.layout}, {smallest.reason}; lower --input-len and --output-len or take more GPUs"
        )
    return (
        f"with {smallest.layout}, which needs least, {smallest.reason}; take larger GPUs or more "
        f"than {best.cluster.num_devices}"
    )
