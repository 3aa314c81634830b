"""`qwen3-dist plan`: predicted memory and speed of every layout on a cluster, best first, and what follows from it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from serve_app.cli import plan_comparison, plan_deployment, plan_inputs
from serve_app.cli.options import changed_config
from serve_app.cli.plan_answers import (
    breaks_first,
    breaks_line,
    cost_line,
    disaggregated,
    disaggregated_line,
)
from serve_app.cli.plan_kinds import Choice, best_on, choice_lines, choices
from serve_app.cli.plan_table import layout_lines

if TYPE_CHECKING:
    from cluster.planning.planner import PlanRequest
    from qwen3_dist.config import ModelConfig

HELP = "compare layouts and GPUs for a model by predicted memory, TTFT, ITL, throughput and cost"
NOTHING_FITS = 2
add_arguments = plan_inputs.add_arguments


def run(args: argparse.Namespace, out: TextIO) -> int:
    plan_inputs.check(args)
    name, config = changed_config(args)
    kinds = plan_inputs.given_kinds(args)
    request = plan_inputs.given_request(args, kinds[0].cluster)
    prices = plan_inputs.given_prices(args, kinds)
    if args.plot:
        from cluster.planning.plots import require_matplotlib

        require_matplotlib()
    if args.compare:
        return plan_comparison.run(args, config, kinds[0].cluster, request, out)
    if len(kinds) > 1 or not kinds[0].sized:
        found = choices(config, kinds, request, args.rate, prices)
        rows = [{**one.as_json(), "breaks_first": None} for one in found]
        to_size = None if kinds[0].sized else args.rate
        _print(args, config, request, found[0], choice_lines(found, request), rows, to_size, out)
        return 0
    best = best_on(config, kinds[0], request, args.rate, prices)
    if args.plot:
        _plot(args.plot, name, config, best, request)
    table = layout_lines(best.planned, request, args.all, best.rated)
    if best.planned[0].fits:
        _print(args, config, request, best, table, _rows(best, prices), None, out)
        return 0
    lines = [json.dumps(row) for row in _rows(best, prices)] if args.json else table
    if lines and not args.render:
        print("\n".join(lines), file=out)
    print(f"qwen3-dist: {_nothing(args, name)}; {_advice(best)}", file=sys.stderr)
    return NOTHING_FITS


def _print(
    args: argparse.Namespace,
    config: ModelConfig,
    request: PlanRequest,
    best: Choice,
    table: list[str],
    rows: list[dict[str, Any]],
    to_size: float | None,
    out: TextIO,
) -> None:
    """The plan, and the file of --render: to stdout in place of the plan, or to --out. `to_size` is the rate for which
    the number of GPUs was found, None if it was given."""
    from cluster.planning.expected_errors import expected_error

    cluster = best.cluster
    settings = plan_deployment.settings(args, cluster, request, best.planned[0])
    if args.render:
        text = plan_deployment.rendered(args.render, settings, cluster)
        if args.out is None:
            out.write(json.dumps({"target": args.render, "text": text}) + "\n" if args.json else text)
            return
        plan_deployment.write(text, args.out)
    breaks = breaks_first(config, request, best)
    rows[0]["breaks_first"] = breaks
    error = expected_error(config, cluster, best.planned[0].layout.world)
    rows[0]["expected_error"] = None if error is None else error.as_json()
    answers = [breaks_line(breaks), cost_line(best.cost), "" if error is None else str(error)]
    if args.disaggregated:
        split = disaggregated(config, request, best, to_size)
        rows[0]["disaggregated"] = split
        answers.append(disaggregated_line(split))
    if args.json:
        print("\n".join(map(json.dumps, rows)), file=out)
        return
    multi_node = cluster.num_devices > cluster.devices_per_node
    serving = [
        *plan_deployment.serve_lines(settings, multi_node),
        *filter(None, [plan_deployment.left_out(request)]),
    ]
    print("\n".join([*table, "", *filter(None, answers), "", *serving]), file=out)


def _rows(best: Choice, prices: Mapping[str, float]) -> list[dict[str, Any]]:
    """The objects of --json, one for each layout."""
    from cluster.planning.prices import costs

    rows: list[dict[str, Any]] = []
    for place, one in enumerate(best.planned):
        row = best.rated[place].as_json() if best.rated else one.as_json()
        cost = costs(best.cluster, one.tokens_per_s or 0.0, prices.get(best.kind))
        rows.append({**row, "cost": cost, "breaks_first": None, "expected_error": None})
    return rows


def _plot(file: Path, name: str, config: ModelConfig, best: Choice, request: PlanRequest) -> None:
    from cluster.planning.planner import at_all_loads
    from cluster.planning.plots import plot_plan

    request = dataclasses.replace(request, concurrency=best.planned[0].concurrency)
    where = f"{best.cluster.num_devices} x {best.kind}"
    load = f"{request.input_len} tokens in, {request.output_len} out"
    plot_plan(file, f"{name} on {where}: {load}", at_all_loads(config, best.cluster, request))


def _nothing(args: argparse.Namespace, name: str) -> str:
    return f"no layout of {name} fits" if args.layout is None else f"{name} does not fit"


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
