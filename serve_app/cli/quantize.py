"""`qwen3-dist quantize`: writes a bf16, fp16 or fp32 checkpoint with weights of 8 or 4 bits."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TextIO

from serve_app.cli.options import MODEL, report
from serve_app.cli.readable import format_bytes
from serve_app.cli.signals import exit_by_signals

HELP = "write a checkpoint with fp8, int8 or int4 weights, in the formats that vLLM reads"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL)
    parser.add_argument("--revision", metavar="TEXT", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--to",
        required=True,
        choices=("fp8", "int8", "int4"),
        help="fp8: e4m3 with a scale per block of 128 x 128, as Qwen's; int8: compressed-tensors, a scale per output; "
        "int4: compressed-tensors' pack-quantized, a scale per group of 128 inputs",
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="new directory, which appears once it is whole"
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    from qwen3_dist.progress import progress_bar
    from qwen3_dist.weights.converter import Conversion
    from qwen3_dist.weights.source import resolve_model

    conversion = Conversion.open(resolve_model(args.model, args.revision), args.to)
    began, total = time.monotonic(), conversion.total_bytes
    bar = progress_bar(True, desc="writing weights", unit="B", unit_scale=True, total=total)
    with exit_by_signals(), bar as shown:
        conversion.write(args.out, shown.update)
    seconds = time.monotonic() - began
    report(f"{args.out} has {format_bytes(total)} of weights, written at {format_bytes(total / seconds)}/s")
    if args.json:
        print(json.dumps({"out": str(args.out), "bytes": total, "seconds": round(seconds, 3)}), file=out)
    return 0
