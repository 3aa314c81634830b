"""`qwen3-dist VERB`: one small module per verb, which imports what only it needs."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from qwen3_dist import __version__
from qwen3_dist.errors import QwenDistError
from serve_app.cli import bench, calibrate, chat, generate, inspect, plan, serve, simulate, sweep
from serve_app.cli.parser import Parser, VerbParser, did_you_mean

USAGE_ERROR = 2
_VERBS = {
    "serve": serve,
    "generate": generate,
    "chat": chat,
    "inspect": inspect,
    "bench": bench,
    "plan": plan,
    "calibrate": calibrate,
    "sweep": sweep,
    "simulate": simulate,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line. Returns the exit code: 0, or 2 with one sentence on stderr."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    if given and given[0] not in (*_VERBS, "-h", "--help", "--version"):
        parser.error(_no_verb(given[0]))
    args = parser.parse_args(given)
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
    parser.add_argument("--version", action="version", version=f"qwen3-dist {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=VerbParser)
    for name, module in _VERBS.items():
        verb = verbs.add_parser(name, help=module.HELP, description=module.HELP)
        verb.add_argument(
            "--json", action="store_true", help="one JSON object a line on stdout, all else on stderr"
        )
        module.add_arguments(verb)
        verb.set_defaults(run=module.run)
    return parser


def _no_verb(word: str) -> str:
    verbs = ", ".join(_VERBS)
    if word.startswith("-"):
        return f"{word} stands before the verb; begin with one of {verbs}"
    near = did_you_mean(difflib.get_close_matches(word, _VERBS, 1))
    return f"there is no verb {word!r}{near or f'; there are {verbs}'}"
