"""`qwen3-dist explain`: where the time of a layout's steps goes, and which change would save most of it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from qwen3_dist.layout import Layout
from qwen3_dist.step_defaults import STEP_DEFAULTS
from serve_app.cli.options import add_model_and_cluster, changed_config, given_cluster, number, positive
from serve_app.cli.readable import format_bytes

if TYPE_CHECKING:
    from cluster.hardware import Cluster
    from cluster.planning.explain import ExplainedStep
    from cluster.planning.next_change import Change
    from cluster.planning.planner import PlannedLayout, PlanRequest

HELP = "show where the time of a layout's steps goes, and which change would save most of it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cpu, gpu = (STEP_DEFAULTS[kind].max_num_batched_tokens for kind in ("cpu", "cuda"))
    add_model_and_cluster(parser)
    parser.add_argument("--layout", required=True, metavar="L", help="the layout, for example tp=2,ep=2")
    for name, what in (
        ("input-len", "tokens in each prompt"),
        ("output-len", "tokens generated for each prompt"),
        ("concurrency", "requests in flight in the whole cluster"),
    ):
        parser.add_argument(f"--{name}", type=positive, required=True, metavar="N", help=what)
    parser.add_argument(
        "--max-num-batched-tokens",
        type=positive,
        metavar="N",
        help=f"most tokens in one step (default: {gpu}; {cpu} on CPU)",
    )
    parser.add_argument(
        "--expert-imbalance",
        type=number(1),
        metavar="X",
        help="load of the busiest expert-parallel rank over the mean (default: 1.2)",
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    from cluster.planning.explain import explain_steps
    from cluster.planning.next_change import next_changes, planned_layout
    from cluster.planning.planner import plan

    layout = Layout.parse(args.layout)
    name, config = changed_config(args)
    layout.validate(config)
    cluster = given_cluster(args)
    request = _request(args, cluster)
    planned = planned_layout(plan(config, cluster, request), layout, cluster)
    steps = explain_steps(config, cluster, request, planned)
    changes = next_changes(config, cluster, request, layout)
    if args.json:
        print(json.dumps(_as_json(name, cluster, planned, steps, changes)), file=out)
    else:
        print("\n".join(_report(name, cluster, planned, steps, changes)), file=out)
    return 0


def _request(args: argparse.Namespace, cluster: Cluster) -> PlanRequest:
    from cluster.planning.planner import PlanRequest

    names = {field.name for field in dataclasses.fields(PlanRequest)}
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    given.setdefault("max_num_batched_tokens", STEP_DEFAULTS[cluster.device_kind].max_num_batched_tokens)
    return PlanRequest(**given)


def _as_json(
    name: str,
    cluster: Cluster,
    planned: PlannedLayout,
    steps: Sequence[ExplainedStep],
    changes: Sequence[Change],
) -> dict[str, Any]:
    return {
        "model": name,
        "cluster": _cluster_name(cluster),
        "predicted": planned.as_json(),
        "steps": [
            {
                "kind": step.kind,
                "share_of_steps": round(step.weight, 4),
                "shape": dataclasses.asdict(step.shape),
                "ms": _ms(step.seconds),
                "terms": {term: _ms(seconds) for term, seconds in step.terms.items()},
                "operations": {
                    term: {each: _ms(seconds) for each, seconds in step.operations(term).items()}
                    for term in step.terms
                },
            }
            for step in steps
        ],
        "changes": [change.as_json() for change in changes],
    }


def _report(
    name: str,
    cluster: Cluster,
    planned: PlannedLayout,
    steps: Sequence[ExplainedStep],
    changes: Sequence[Change],
) -> list[str]:
    memory = ", ".join(f"{what} {format_bytes(size)}" for what, size in planned.bytes_per_rank.items())
    lines = [f"{name}, {planned.layout} on {_cluster_name(cluster)}, predicted"]
    lines.append(f"memory of the fullest rank: {memory}")
    for step in steps:
        lines += ["", _title(step), *table(_rows(step))]
    lines += ["", "Next best changes:" if changes else _NO_CHANGE, *(f"  {change}" for change in changes)]
    return lines


_NO_CHANGE = "No neighbouring layout and no setting is predicted to give 1% more tokens/s."


def _title(step: ExplainedStep) -> str:
    shape = step.shape
    what = f"{shape.num_decodes:,} sequences of {_mean_context(step):,} tokens"
    if step.kind == "prompt":
        what = f"{shape.prefill_tokens:,} tokens of prompts beside {what}"
    return f"{step.kind} step of a dp group: {what}; {step.weight:.0%} of the steps"


def _mean_context(step: ExplainedStep) -> int:
    return round(step.shape.decode_context_tokens / max(1, step.shape.num_decodes))


def _rows(step: ExplainedStep) -> list[tuple[str, ...]]:
    total = step.seconds
    rows: list[tuple[str, ...]] = [("", "ms", "share", "of which")]
    for term, seconds in step.terms.items():
        operations = step.operations(term)
        parts = ", ".join(f"{operation} {1e3 * each:.2f}" for operation, each in operations.items())
        rows.append((term, f"{1e3 * seconds:.2f}", f"{seconds / total:.0%}", parts))
    return [*rows, ("all", f"{1e3 * total:.2f}", "100%", "")]


def table(rows: Sequence[tuple[str, ...]]) -> Iterable[str]:
    """Lines of aligned columns: the first and the last to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if place in (0, len(row) - 1) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield ("  " + "  ".join(cells)).rstrip()


def _cluster_name(cluster: Cluster) -> str:
    if cluster.shared_host:
        return cluster.device.name
    return f"{cluster.num_devices} x {cluster.device.name}"


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 4)
