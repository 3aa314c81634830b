"""`qwen3-dist verify`: compares a model's logits with transformers' on the same checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TextIO

from serve_app.cli.options import MODEL
from serve_app.cli.readable import report_lines

HELP = "compare a model's logits, and its hidden states, with transformers' on fixed prompts"
APART = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="", help=MODEL)
    parser.add_argument("--revision", metavar="TEXT", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--layers",
        action="store_true",
        help="compare each block's hidden states too, and name the first apart",
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    from qwen3_dist.verify import verify
    from qwen3_dist.weights.source import resolve_model

    found = verify(resolve_model(args.model, args.revision), args.layers)
    report = dataclasses.asdict(found)
    if args.json:
        print(json.dumps(report), file=out)
    else:
        print("\n".join(report_lines(_readable(report))), file=out)
    return APART if found.first_apart else 0


def _readable(report: dict[str, object]) -> dict[str, object]:
    shown = {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in report.items()}
    shown["layers"] = [f"{error:.2g}" for error in report["layers"]] or None  # type: ignore[attr-defined]
    return shown | {"first_apart": report["first_apart"] or "none"}
