"""`qwen3-dist explain`: where the time of a layout's steps goes, and which change would save most of it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from qwen3_dist.errors import ConfigError
from qwen3_dist.hf_overrides import HfOverrides
from qwen3_dist.layout import Layout
from serve_app.cli import plan_inputs
from serve_app.cli.options import add_model_and_cluster, changed_config, given_cluster
from serve_app.cli.readable import format_bytes
from serve_app.cli.runnable import runnable

if TYPE_CHECKING:
    from cluster.calibration.measured_steps import Compared
    from cluster.hardware import Cluster
    from cluster.planning.explain import ExplainedStep
    from cluster.planning.next_change import Change
    from cluster.planning.planner import PlannedLayout, PlanRequest
    from qwen3_dist.config import ModelConfig

HELP = "show where the time of a layout's steps goes, and which change would save most of it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_and_cluster(parser)
    parser.add_argument("--layout", required=True, metavar="L", help="the layout, for example tp=2,ep=2")
    plan_inputs.add_load(parser.add_argument_group("load"), required=True)
    plan_inputs.add_engine(parser.add_argument_group("engine of each replica"))
    parser.add_argument(
        "--measure",
        action="store_true",
        help="run such steps on this machine too, of which --cluster must be the file that calibrate wrote",
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    from cluster.planning.expected_errors import expected_error
    from cluster.planning.explain import explain_steps
    from cluster.planning.next_change import Setting, next_changes, planned_layout

    layout = Layout.parse(args.layout)
    name, config = changed_config(args)
    layout.validate(config)
    cluster = given_cluster(args)
    request = plan_inputs.given_request(args, cluster)
    if args.measure and (request.drafted or request.lora_rank):
        raise ConfigError(
            "--measure runs steps without drafts and adapters; leave these options or --measure out"
        )
    planned = planned_layout(Setting(config, request, args.rate), layout, cluster).planned
    steps = explain_steps(config, cluster, request, planned, spread=args.rate is not None)
    changes = next_changes(config, cluster, request, layout, args.rate)
    error = expected_error(config, cluster, layout.world)
    measured = _measured(args, name, config, cluster, request, steps) if args.measure else []
    if args.json:
        shown = _as_json(name, cluster, planned, steps, changes)
        shown["expected_error"] = None if error is None else error.as_json()
        if args.measure:
            shown["measured"] = [each.as_json() for each in measured]
        print(json.dumps(shown), file=out)
    else:
        lines = _report(name, cluster, planned, request, steps, changes)
        expected = [] if error is None else ["", str(error)]
        print("\n".join([*lines, *expected, *measured_lines(measured)]), file=out)
    return 0


def _measured(
    args: argparse.Namespace,
    name: str,
    config: ModelConfig,
    cluster: Cluster,
    request: PlanRequest,
    steps: Sequence[ExplainedStep],
) -> list[Compared]:
    from cluster.calibration.measured_steps import Compared, measure_steps
    from cluster.planning.planner import cost_model
    from qwen3_dist.settings import EngineConfig
    from qwen3_dist.worker.cards import local_device

    layout = Layout.parse(args.layout)
    device = local_device("auto")
    if device != cluster.device_kind:
        raise ConfigError(
            f"--measure runs steps on this machine, a {device} device, and the prediction is for "
            f"{cluster_name(cluster)}; give --cluster the file that `qwen3-dist calibrate --out` wrote here"
        )
    with runnable(args.model, name) as (path, random_weights):
        engine = EngineConfig(
            model=str(path),
            load_format="random" if random_weights else "checkpoint",
            hf_overrides=HfOverrides.parse(args.hf_overrides),
            layout=layout,
            device=device,
            quantize=args.quantize,
            kv_cache_dtype=args.kv_cache_dtype,
            max_num_batched_tokens=request.max_num_batched_tokens,
            executor="in_process" if layout.world == 1 else "processes",
        )
        decode = steps[0].shape
        context = decode.decode_context_tokens // decode.num_decodes
        found = measure_steps(engine, decode.num_decodes, context, request.input_len)
    return [Compared.of(step, cost_model(config, layout, cluster, request)) for step in found]


def _as_json(
    name: str,
    cluster: Cluster,
    planned: PlannedLayout,
    steps: Sequence[ExplainedStep],
    changes: Sequence[Change],
) -> dict[str, Any]:
    return {
        "model": name,
        "cluster": cluster_name(cluster),
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
    request: PlanRequest,
    steps: Sequence[ExplainedStep],
    changes: Sequence[Change],
) -> list[str]:
    memory = ", ".join(f"{what} {format_bytes(size)}" for what, size in planned.bytes_per_rank.items())
    lines = [f"{name}, {planned.layout} on {cluster_name(cluster)}, predicted"]
    lines.append(f"memory of the fullest rank: {memory}")
    itl = f", ITL {planned.itl_ms:,.2f} ms" if planned.itl_ms else ""
    lines.append(f"TTFT {planned.ttft_ms:,.1f} ms{itl}")
    for step in steps:
        lines += ["", _title(step, request), *table(_rows(step))]
    lines += ["", "Next best changes:" if changes else _NO_CHANGE, *(f"  {change}" for change in changes)]
    return lines


_NO_CHANGE = "No neighbouring layout and no setting is predicted to give 2% more tokens/s."


def measured_lines(steps: Sequence[Compared]) -> list[str]:
    lines = []
    for step in steps:
        shape = step.measured.shape
        what = f"{shape.num_decodes:,} sequences with {shape.decode_context_tokens:,} tokens in all"
        if step.measured.kind == "prompt":
            what = f"one prompt of {shape.prefill_tokens:,} tokens"
        rows: list[tuple[str, ...]] = [("", "measured ms", "predicted ms", "")]
        rows += [
            (name, _or_dash(measured), _or_dash(predicted), "")
            for name, (measured, predicted) in step.operations.items()
        ]
        rows.append(("all", _or_dash(step.measured.seconds), _or_dash(step.predicted_s), ""))
        lines += ["", f"{step.measured.kind} step of a dp group, measured: {what}", *table(rows)]
    return [*lines, "", *_MEASURED_LEGEND] if lines else []


_MEASURED_LEGEND = (
    "kernels that join operations   what they save: each operation was timed alone, in steps without them",
    "outside of the ranks           planning, messages, and waiting for either",
    "A collective's time includes waiting for the other ranks.",
    "What an operation reads and what it multiplies cannot be told apart by a clock.",
)


def _or_dash(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.3f}"


def _title(step: ExplainedStep, request: PlanRequest) -> str:
    shape = step.shape
    sequences = round(shape.num_decodes / (1 + request.drafted))
    context = round(shape.decode_context_tokens / max(1, sequences))
    what = f"{sequences:,} sequences of {context:,} tokens"
    if request.drafted:
        what += f" with {request.drafted} drafts each"
    if step.kind == "prompt":
        what = f"{shape.prefill_tokens:,} tokens of prompts beside {what}"
    return f"{step.kind} step of a dp group: {what}; {step.weight:.0%} of the steps"


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


def cluster_name(cluster: Cluster) -> str:
    if cluster.shared_host:
        return cluster.device.name
    return f"{cluster.num_devices} x {cluster.device.name}"


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 4)
