"""`qwen3-dist stop`: ends a deployed service, its requests first."""

from __future__ import annotations

import argparse
from typing import TextIO

from serve_app.cli.options import add_ray_address, report
from serve_app.cli.serve import StopSignals
from serve_app.settings import APP_NAME

HELP = "end a deployed service: no new requests, time for the running ones, then it is removed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", default=APP_NAME, help=f"name of the service (default: {APP_NAME})")
    add_ray_address(parser)
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=600.0,
        metavar="X",
        help="longest wait for running requests (default: 600)",
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    from cluster.ray_cluster import joined
    from serve_app.launch.deploy import stop

    with joined(args.ray_address):
        signals = StopSignals()
        signals.begin_shutdown()
        stop(args.name, report, signals.stop_now, args.timeout_s)
    print(f"{args.name} has ended", file=out)
    return 0
