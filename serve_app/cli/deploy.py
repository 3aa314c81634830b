"""`qwen3-dist deploy`: puts a service on a running Ray cluster, or changes the one that is there, and ends."""

from __future__ import annotations

import argparse
import json
from typing import TextIO

from serve_app.cli.options import (
    MODEL,
    add_config_file,
    add_ray_address,
    add_service_settings,
    given_service,
    report,
)

HELP = "deploy a service on a running Ray cluster, or change the deployed one; it stays when the command ends"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="", help=MODEL)
    add_config_file(parser)
    add_ray_address(parser)
    parser.add_argument("--no-wait", action="store_true", help="do not wait until the service answers")
    add_service_settings(parser)


def run(args: argparse.Namespace, out: TextIO) -> int:
    source = given_service(args)
    config = source.read()
    from cluster.ray_cluster import joined
    from serve_app.launch.deploy import deploy

    with joined(args.ray_address), source.with_lines():
        url = deploy(config, report, wait=not args.no_wait)
    models = [model.name for model in config.models]
    if args.json:
        print(
            json.dumps(
                {
                    "event": "deployed",
                    "name": config.endpoint.name,
                    "url": url and f"{url}/v1",
                    "models": models,
                }
            ),
            file=out,
        )
    elif url:
        print(
            f"{', '.join(models)} is ready at {url}/v1; `qwen3-dist status` shows it, `qwen3-dist stop` ends it",
            file=out,
        )
    else:
        print(f"{', '.join(models)} is being deployed; `qwen3-dist status` shows how far it is", file=out)
    return 0
