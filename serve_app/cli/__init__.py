"""`qwen3-dist VERB`: one small module per verb, which imports what only it needs."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from qwen3_dist.errors import QwenDistError
from serve_app.cli import bench, calibrate, generate, inspect, plan, serve, simulate, sweep
from serve_app.cli.options import Parser

USAGE_ERROR = 2
_VERBS = {
    "serve": serve,
    "generate": generate,
    "inspect": inspect,
    "bench": bench,
    "plan": plan,
    "calibrate": calibrate,
    "sweep": sweep,
    "simulate": simulate,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line. Returns the exit code: 0, or 2 with one sentence on stderr."""
    args = build_parser().parse_args(argv)
    run: Callable[[argparse.Namespace, TextIO], int] = args.run
    out = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Ray and others print what is no result
            return run(args, out)
    except QwenDistError as error:
        print(f"qwen3-dist: {error}", file=sys.stderr)
        return USAGE_ERROR
    except BrokenPipeError:  # the reader of a long table has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = Parser(prog="qwen3-dist", description="Distributed inference for Qwen3 checkpoints.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, module in _VERBS.items():
        verb = verbs.add_parser(name, help=module.HELP, description=module.HELP)
        verb.add_argument(
            "--json", action="store_true", help="one JSON object a line on stdout, all else on stderr"
        )
        module.add_arguments(verb)
        verb.set_defaults(run=module.run)
    return parser
