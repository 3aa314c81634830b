"""`qwen3-dist inspect`: a model's sizes and its memory per rank, from its config.json alone."""

from __future__ import annotations

import argparse
import json
from typing import TextIO

from qwen3_dist.layout import Layout
from serve_app.cli.options import MODEL_OR_CONFIG, positive
from serve_app.cli.readable import report_lines

HELP = "show a model's sizes, its memory per rank and its valid layouts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="", help=MODEL_OR_CONFIG)
    parser.add_argument("--revision", metavar="TEXT", help="branch, tag or commit of a hub id")
    parser.add_argument("--layout", metavar="LAYOUT", default="", help="layout to report on (default: tp=1)")
    parser.add_argument(
        "--world",
        type=positive,
        metavar="N",
        help="number of ranks to list valid layouts for (default: that of --layout)",
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    from cluster.planning.memory import inspect_model
    from cluster.planning.official import find_config

    layout = Layout.parse(args.layout)
    name, config = find_config(args.model, args.revision)
    report = inspect_model(name, config, layout, args.world or layout.world)
    print(json.dumps(report) if args.json else "\n".join(report_lines(report)), file=out)
    return 0
