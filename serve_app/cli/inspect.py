"""`qwen3-dist inspect`: what a checkpoint holds and what it costs per rank, without loading it."""

from __future__ import annotations

import argparse
import json
from typing import Any, TextIO

from qwen3_dist.layout import Layout

HELP = "show a model's sizes, memory per rank and the layouts that fit it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", default="", help="checkpoint directory or hub id; omitted: the bundled model"
    )
    parser.add_argument("--revision", metavar="TEXT", help="branch, tag or commit of a hub id")
    parser.add_argument("--layout", metavar="LAYOUT", default="", help="layout to cost (default: tp=1)")
    parser.add_argument(
        "--world", type=int, metavar="N", help="ranks whose valid layouts are listed (default: the layout's)"
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    from cluster.memory import inspect_model
    from qwen3_dist.weights.source import resolve_model

    layout = Layout.parse(args.layout)
    report = inspect_model(resolve_model(args.model, args.revision), layout, args.world or layout.world)
    lines = (
        [json.dumps(report)]
        if args.json
        else [f"{name}: {_readable(value)}" for name, value in report.items()]
    )
    print("\n".join(lines), file=out)
    return 0


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={_readable(item)}" for name, item in value.items())
    if isinstance(value, list):
        return "; ".join(map(_readable, value)) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
