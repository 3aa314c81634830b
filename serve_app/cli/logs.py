"""`qwen3-dist logs`: the log lines of a service, from all nodes of its Ray cluster."""

from __future__ import annotations

import argparse
import contextlib
import time
from typing import TextIO

from qwen3_dist.errors import ResourceError
from serve_app.cli.options import add_ray_address, positive, report
from serve_app.settings import APP_NAME

HELP = "print the log lines of a service, from all nodes of its Ray cluster"
_PERIOD_S = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", default=APP_NAME, help=f"name of the service (default: {APP_NAME})")
    add_ray_address(parser)
    parser.add_argument("--follow", action="store_true", help="go on with new lines until interrupted")
    parser.add_argument("--request-id", metavar="ID", default="", help="only what names this request")
    parser.add_argument(
        "--last",
        type=positive,
        default=1000,
        metavar="N",
        help="only the last lines of each file (default: 1000; all of a request's)",
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    from cluster.ray_cluster import joined
    from serve_app.launch.logs import ServiceLogs

    with joined(args.ray_address), contextlib.suppress(KeyboardInterrupt):
        logs, printed = ServiceLogs(args.name), 0
        while True:
            for entry in logs.new_entries(None if args.request_id else args.last):
                if args.request_id in entry.text:
                    print(entry.text, file=out, flush=True)
                    printed += 1
            if not args.follow:
                if missing := logs.missing():
                    raise ResourceError(missing)
                if not printed:
                    report(
                        f"no line names request {args.request_id}" if args.request_id else "the log is empty"
                    )
                break
            time.sleep(_PERIOD_S)
    return 0
