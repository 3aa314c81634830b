"""`qwen3-dist inspect`: what a checkpoint holds and what it costs per rank, without loading it."""

from __future__ import annotations

import argparse
from typing import TextIO

HELP = "show a model's sizes, memory per rank and the layouts that fit it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", default="", help="checkpoint directory or hub id; omitted: the bundled model"
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    raise NotImplementedError
