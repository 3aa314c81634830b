"""`qwen3-dist config`: the settings a service would have, and where each comes from."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TextIO

from serve_app.cli.options import MODEL, add_config_file, add_service_settings, given_service, report

HELP = "show and check the effective settings of a file and of options, and where each comes from; starts nothing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="", help=MODEL)
    add_config_file(parser)
    parser.add_argument("--changed", action="store_true", help="leave out settings at their defaults")
    add_service_settings(parser)


def run(args: argparse.Namespace, out: TextIO) -> int:
    source = given_service(args)
    config = source.read()
    from serve_app.launch.model_check import check_each, check_keys_file, check_model_at_hand

    with source.with_lines():
        at_hand = check_each(config.models, check_model_at_hand)
        check_keys_file(config.ingress)
    for model, checked in zip(config.models, at_hand, strict=True):
        if not checked:
            report(
                f"{model.replica.engine.model} was not checked against layout, context and adapters, since its "
                "config.json is not on this machine; `serve` and `deploy` check it"
            )
    settings = [each for each in source.effective(config) if not args.changed or each.source != "default"]
    if args.json:
        for each in settings:
            print(json.dumps(asdict(each)), file=out)
        return 0
    several = len(config.models) > 1
    rows = [
        (
            f"{each.model}: {each.name}" if several and each.model else each.name,
            json.dumps(each.value),
            each.source,
        )
        for each in settings
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)] if rows else []
    for name, value, origin in rows:
        print(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {origin}", file=out)
    return 0
