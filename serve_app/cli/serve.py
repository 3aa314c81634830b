"""`qwen3-dist serve`: deploys a model, says how to call it, and ends cleanly."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import urllib.request
from collections.abc import Iterator
from typing import Any, TextIO

from qwen3_dist.settings import EngineConfig
from serve_app.cli.options import add_settings, given_settings
from serve_app.config import ServiceConfig, read_service_config

HELP = "serve a model over an OpenAI-compatible HTTP endpoint until Ctrl-C"
_SAMPLE_QUESTION = "Tell me a short story about the sea."
_SAMPLE_TOKENS = 48


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", default="", help="checkpoint directory or hub id; omitted: the bundled model"
    )
    parser.add_argument(
        "--ray-address", help="address of a Ray cluster to join, or 'auto'; omitted: start a local one"
    )
    parser.add_argument(
        "--sample", action="store_true", help="once ready, ask one question and show the streamed answer"
    )
    parser.add_argument(
        "--exit-after-sample", action="store_true", help="end after the sample answer (implies --sample)"
    )
    add_settings(parser, "service", ServiceConfig, skip=("engine",))
    add_settings(parser, "engine of each replica", EngineConfig, skip=("model",))


def run(args: argparse.Namespace, out: TextIO) -> int:
    config = read_service_config(given_settings(args, ServiceConfig, EngineConfig))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from serve_app.launch import running_service

    try:
        with running_service(config, args.ray_address, _report) as url:
            _announce(out, args.json, url, config.served_name)
            if args.sample or args.exit_after_sample:
                _show_sample(out, args.json, url, config.served_name)
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


def _show_sample(out: TextIO, as_json: bool, url: str, model: str) -> None:
    """Asks the endpoint one question and prints the answer as it streams in, and how to repeat it."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": _SAMPLE_QUESTION}],
        "max_tokens": _SAMPLE_TOKENS,
        "stream": True,
    }
    curl = f"curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
    if as_json:
        answer = "".join(_stream_chat(url, body))
        print(
            json.dumps({"event": "sample", "question": _SAMPLE_QUESTION, "answer": answer, "curl": curl}),
            file=out,
            flush=True,
        )
        return
    print(f"\n> {_SAMPLE_QUESTION}", file=out, flush=True)
    for text in _stream_chat(url, body):
        print(text, end="", file=out, flush=True)
    print(f"\n\nThe same again:\n  {curl}", file=out, flush=True)


def _stream_chat(url: str, body: dict[str, Any]) -> Iterator[str]:
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        for line in response:
            data = line.removeprefix(b"data: ").strip()
            if data and data != b"[DONE]":
                for choice in json.loads(data)["choices"]:
                    yield choice["delta"].get("content", "")


def _report(line: str) -> None:
    print(f"qwen3-dist: {line}", file=sys.stderr, flush=True)
