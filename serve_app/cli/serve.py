"""`qwen3-dist serve`: deploys a model, prints its URL, and shuts down gracefully."""

from __future__ import annotations

import argparse
import json
import os
import signal
import types
from typing import TextIO

from qwen3_dist.errors import ConfigError
from serve_app.cli.options import MODEL, add_config_file, add_service_settings, given_service, report
from serve_app.settings import ServiceConfig
from serve_app.settings.keys import is_hash

HELP = "serve a model over an OpenAI-compatible HTTP endpoint until Ctrl-C"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="", help=MODEL)
    add_config_file(parser)
    parser.add_argument(
        "--ray-address", help="address of a Ray cluster to join, or 'auto' (default: start a local Ray)"
    )
    parser.add_argument(
        "--sample", action="store_true", help="once ready, ask three questions and print the streamed answers"
    )
    parser.add_argument(
        "--exit-after-sample", action="store_true", help="end after the sample answers (implies --sample)"
    )
    add_service_settings(parser)


class StopSignals:
    """SIGINT and SIGTERM: the first shuts the service down gracefully, the second ends its requests at once, and the
    third kills this process."""

    def __init__(self) -> None:
        self._shutting_down = self._stop_now = False
        for number in (signal.SIGINT, signal.SIGTERM):
            if (
                signal.getsignal(number) != signal.SIG_IGN
            ):  # a shell ignores SIGINT for background jobs of scripts
                signal.signal(number, self._handle)

    def stop_now(self) -> bool:
        """Whether to end running requests at once."""
        return self._stop_now

    def begin_shutdown(self) -> None:
        """Marks that the shutdown has begun without a signal, so that the next signal counts as the second."""
        self._shutting_down = True

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self._stop_now:
            os._exit(1)
        if self._shutting_down:
            self._stop_now = True
            return
        self._shutting_down = True
        raise KeyboardInterrupt


def run(args: argparse.Namespace, out: TextIO) -> int:
    source = given_service(args)
    config = source.read()
    if args.sample or args.exit_after_sample:
        _check_sample_key(config)
    signals = StopSignals()
    from serve_app.cli.sample import show_sample
    from serve_app.launch.foreground import running_service
    from serve_app.launch.startup import own_tls

    try:
        with (
            source.with_lines(),
            running_service(config, args.ray_address, report, signals.stop_now) as service,
        ):
            try:
                model = config.models[0].name
                _announce(out, args.json, service.url, model)
                if args.sample or args.exit_after_sample:
                    key, tls = config.ingress.api_key, own_tls(config.endpoint)
                    show_sample(out, args.json, service.url, model, key, tls)
                if not args.exit_after_sample:
                    report("ready; Ctrl-C ends it")
                    service.watch()
            finally:
                signals.begin_shutdown()
    except KeyboardInterrupt:
        report("stopped")
    return 0


def _check_sample_key(config: ServiceConfig) -> None:
    """Raises ConfigError if the questions of --sample would be refused for want of a key."""
    ingress = config.ingress
    if is_hash(ingress.api_key) or (ingress.keys_file and not ingress.api_key):
        raise ConfigError(
            "--sample needs the key itself as api_key, not a hash or a keys_file; leave --sample out"
        )


def _announce(out: TextIO, as_json: bool, url: str, model: str) -> None:
    if as_json:
        print(
            json.dumps({"event": "ready", "url": f"{url}/v1", "model": model, "docs": f"{url}/docs"}),
            file=out,
            flush=True,
        )
    else:
        print(
            f"{model} is ready at {url}/v1 (OpenAI-compatible; API reference at {url}/docs)",
            file=out,
            flush=True,
        )
