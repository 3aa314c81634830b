"""`qwen3-dist shard`: writes a checkpoint with a file for each rank of a layout."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TextIO

from serve_app.cli.options import MODEL, report
from serve_app.cli.readable import format_bytes
from serve_app.cli.signals import exit_by_signals

HELP = "write a checkpoint with a file for each rank of a layout, which ranks read plainly"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL)
    parser.add_argument("--revision", metavar="TEXT", help="branch, tag or commit of a hub id")
    parser.add_argument("--layout", required=True, metavar="TEXT", help="for example tp=8,ep=8")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="new directory, which appears once it is whole"
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    from qwen3_dist.layout import Layout
    from qwen3_dist.progress import progress_bar
    from qwen3_dist.weights.sharder import Sharding
    from qwen3_dist.weights.source import resolve_model

    sharding = Sharding.open(resolve_model(args.model, args.revision), Layout.parse(args.layout))
    began, total = time.monotonic(), sharding.total_bytes
    bar = progress_bar(True, desc="writing weights", unit="B", unit_scale=True, total=total)
    with exit_by_signals(), bar as shown:
        sharding.write(args.out, shown.update)
    seconds = time.monotonic() - began
    report(f"{args.out} has {format_bytes(total)} of weights in {len(sharding.shards)} files")
    if args.json:
        found = {
            "out": str(args.out),
            "bytes": total,
            "files": len(sharding.shards),
            "seconds": round(seconds, 3),
        }
        print(json.dumps(found), file=out)
    return 0
