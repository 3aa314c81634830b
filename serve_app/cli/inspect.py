"""`qwen3-dist inspect`: a model's sizes and its memory per rank, from its config.json, and whether its weights are
there, from the headers of their files."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, TextIO

from qwen3_dist.errors import CheckpointError
from qwen3_dist.layout import Layout
from serve_app.cli.options import MODEL_OR_CONFIG, add_changes_of_model, changed_config, positive
from serve_app.cli.readable import report_lines

if TYPE_CHECKING:
    from qwen3_dist.config import ModelConfig

HELP = "show a model's sizes, its memory per rank and its valid layouts"

UNUSABLE = 2


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
    add_changes_of_model(parser)


def run(args: argparse.Namespace, out: TextIO) -> int:
    from cluster.planning.memory import inspect_model

    layout = Layout.parse(args.layout)
    name, config = changed_config(args, args.revision)
    report = inspect_model(name, config, layout, args.world or layout.world, args.kv_cache_dtype)
    fault = None
    try:
        report["weights"] = _weights(args.model, args.revision, config)
    except CheckpointError as error:
        fault, report["weights"] = error, "not usable"
    print(json.dumps(report) if args.json else "\n".join(report_lines(report)), file=out)
    if fault is not None:
        print(f"qwen3-dist: {fault}", file=sys.stderr)
    return 0 if fault is None else UNUSABLE


def _weights(model: str, revision: str | None, config: ModelConfig) -> str:
    """Whether the weights of `model` are on this machine. Raises CheckpointError if they do not fit `config`."""
    from qwen3_dist.weights.checks import check_checkpoint
    from qwen3_dist.weights.files import has_weights
    from qwen3_dist.weights.source import canonical_name, config_at_hand, local_path

    if local_path(canonical_name(model)).is_file():
        return "not here"
    path = config_at_hand(model, revision)
    if path is None or not has_weights(path):
        return "not here"
    return f"complete, {check_checkpoint(path, config):,} tensors"
