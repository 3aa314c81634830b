"""`qwen3-dist serve`: deploys a model, says how to call it, and ends cleanly."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from typing import TextIO

from qwen3_dist.settings import EngineConfig
from serve_app.cli.options import add_settings, given_settings
from serve_app.config import ServiceConfig, read_service_config

HELP = "serve a model over an OpenAI-compatible HTTP endpoint until Ctrl-C"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", default="", help="checkpoint directory or hub id; omitted: the bundled model"
    )
    parser.add_argument(
        "--ray-address", help="address of a Ray cluster to join, or 'auto'; omitted: start a local one"
    )
    parser.add_argument(
        "--sample", action="store_true", help="once ready, ask three questions and show the streamed answers"
    )
    parser.add_argument(
        "--exit-after-sample", action="store_true", help="end after the sample answers (implies --sample)"
    )
    add_settings(parser, "service", ServiceConfig, skip=("engine",))
    add_settings(parser, "engine of each replica", EngineConfig, skip=("model",))


def run(args: argparse.Namespace, out: TextIO) -> int:
    config = read_service_config(given_settings(args, ServiceConfig, EngineConfig))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from serve_app.cli.sample import show_sample
    from serve_app.launch import running_service

    try:
        with running_service(config, args.ray_address, _report) as url:
            _announce(out, args.json, url, config.served_name)
            if args.sample or args.exit_after_sample:
                show_sample(out, args.json, url, config.served_name, config.api_key)
            if not args.exit_after_sample:
                _report("ready; Ctrl-C ends it")
                signal.pause()
    except KeyboardInterrupt:
        _report("stopped")
    return 0


def _announce(out: TextIO, as_json: bool, url: str, model: str) -> None:
    if as_json:
        print(json.dumps({"event": "ready", "url": f"{url}/v1", "model": model}), file=out, flush=True)
    else:
        print(f"{model} is ready at {url}/v1 (OpenAI-compatible)", file=out, flush=True)


def _report(line: str) -> None:
    print(f"qwen3-dist: {line}", file=sys.stderr, flush=True)
