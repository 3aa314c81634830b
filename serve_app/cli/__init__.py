"""`qwen3-dist VERB`: one module per verb. Each imports its heavy dependencies only when it runs."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from qwen3_dist import __version__
from qwen3_dist.errors import QwenDistError
from serve_app.cli import (
    bench,
    bench_serve,
    calibrate,
    chat,
    config,
    deploy,
    explain,
    generate,
    inspect,
    keys,
    logs,
    plan,
    quantize,
    render,
    serve,
    shard,
    simulate,
    status,
    stop,
    sweep,
    top,
    verify,
)
from serve_app.cli.parser import Parser, VerbParser, did_you_mean

USAGE_ERROR = 2
_VERBS = {
    "serve": serve,
    "deploy": deploy,
    "status": status,
    "top": top,
    "logs": logs,
    "stop": stop,
    "config": config,
    "render": render,
    "keys": keys,
    "generate": generate,
    "chat": chat,
    "inspect": inspect,
    "quantize": quantize,
    "shard": shard,
    "verify": verify,
    "bench": bench,
    "bench serve": bench_serve,
    "plan": plan,
    "explain": explain,
    "calibrate": calibrate,
    "sweep": sweep,
    "simulate": simulate,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line. Returns the exit code of the verb; 2, with one sentence on stderr, for a
    QwenDistError."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:2] == ["bench", "serve"]:
        arguments[:2] = ["bench serve"]
    parser = build_parser()
    if arguments and arguments[0] not in (*_VERBS, "-h", "--help", "--version"):
        parser.error(_unknown_verb(arguments[0]))
    args = parser.parse_args(arguments)
    run: Callable[[argparse.Namespace, TextIO], int] = args.run
    out = sys.stdout
    _name_warnings()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # keep the output of Ray and others out of the results
            return run(args, out)
    except QwenDistError as error:
        print(f"qwen3-dist: {error}", file=sys.stderr)
        return USAGE_ERROR
    except BrokenPipeError:  # for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


class _Warnings(logging.Handler):
    """Prints warnings of ours as `qwen3-dist: ...` to the standard error of the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"qwen3-dist: {self.format(record)}", file=sys.stderr, flush=True)


def _name_warnings() -> None:
    """Without a handler Python prints them bare, between the lines of other libraries."""
    for name in ("qwen3_dist", "cluster", "serve_app"):
        log = logging.getLogger(name)
        if not any(isinstance(handler, _Warnings) for handler in log.handlers):
            log.addHandler(_Warnings(logging.WARNING))


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = Parser(prog="qwen3-dist", description="Distributed inference for Qwen3 checkpoints.")
    parser.add_argument("--version", action="version", version=f"qwen3-dist {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=VerbParser)
    for name, module in _VERBS.items():
        verb = verbs.add_parser(name, help=module.HELP, description=module.HELP)
        verb.add_argument(
            "--json",
            action="store_true",
            help="print JSON objects on stdout, one per line; everything else goes to stderr",
        )
        module.add_arguments(verb)
        verb.set_defaults(run=module.run)
    return parser


def _unknown_verb(word: str) -> str:
    verbs = ", ".join(_VERBS)
    if word.startswith("-"):
        return f"option {word} comes before the verb; start with one of {verbs}"
    near = did_you_mean(difflib.get_close_matches(word, _VERBS, 1))
    return f"there is no verb {word!r}{near or f'; the verbs are {verbs}'}"
