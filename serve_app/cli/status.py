"""`qwen3-dist status`: what runs on a Ray cluster, and what it waits for."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TextIO

from serve_app.cli.options import add_ray_address

HELP = "show the deployed services of a Ray cluster: their state, their replicas, and what they wait for"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_ray_address(parser)


def run(args: argparse.Namespace, out: TextIO) -> int:
    from cluster.ray_cluster import joined
    from serve_app.launch.status import application_states

    with joined(args.ray_address):
        states = application_states()
    if args.json:
        for state in states:
            print(json.dumps(asdict(state)), file=out)
        return 0
    if not states:
        print("no service is deployed", file=out)
        return 0
    width = max(len(state.name) for state in states)
    for state in states:
        replicas = f"{state.running} running" + (f", {state.starting} starting" if state.starting else "")
        below = f" at {state.route_prefix}" if state.route_prefix else ""
        print(f"{state.name:<{width}}  {state.status:<13}  {replicas}{below}", file=out)
        if state.waits_for:
            print(f"{'':<{width}}  waits for room for {state.waits_for}", file=out)
        if state.message:
            print(f"{'':<{width}}  {state.message}", file=out)
    return 0
