"""`qwen3-dist top`: a live view of a running service."""

from __future__ import annotations

import argparse
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, TextIO

from qwen3_dist.errors import ResourceError
from serve_app.cli.options import number, report

HELP = "watch a running service: replicas, tokens per second, queue, KV cache, slowest ranks, busiest experts"
_TIMEOUT_S = 10.0
_CLEAR = "\x1b[H\x1b[J"
_HEADING = (
    f"  {'replica':<10} {'layout':<14} {'running':>7} {'waiting':>7} {'KV':>5}"
    f" {'out tok/s':>9} {'in tok/s':>9} {'steps/s':>8}"
)
_KEY_VARIABLES = ("QWEN3_DIST_API_KEY", "OPENAI_API_KEY")
Json = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000", help="address of the service")
    parser.add_argument(
        "--interval", type=number(0, above=True), default=2.0, metavar="S", help="seconds between views"
    )
    parser.add_argument("--once", action="store_true", help="show one view and end")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"key of the service (default: {_KEY_VARIABLES[0]} or {_KEY_VARIABLES[1]} of the environment)",
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    watched = _Watched(args)
    clear = "" if args.once or args.json or not out.isatty() else _CLEAR
    began = False
    try:
        while True:
            try:
                print(f"{clear}{watched.view()}", file=out, flush=True)
                began = True
            except ResourceError as error:
                if not began:
                    raise
                if clear:  # the service may come back
                    print(f"{clear}{error}", file=out, flush=True)
                else:
                    report(str(error))
            if args.once:
                return 0
            time.sleep(args.interval)
    except KeyboardInterrupt:
        return 0


class _Watched:
    """A service, and what it told at the last view, from which its rates follow."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._earlier: dict[str, Json] = {}
        self._told = time.monotonic()

    def view(self) -> str:
        """What is to be seen now, as text or JSON. Raises ResourceError if the service does not tell."""
        view = _read(self._args, "/v1/cluster")
        now = time.monotonic()
        rates = _rates(view, self._earlier, now - self._told)
        self._earlier = {replica["id"]: replica["load"] for replica in _answering(view)}
        self._told = now
        if self._args.json:
            return json.dumps(view)
        try:
            experts = list(_expert_lines(_read(self._args, "/v1/cluster/experts")))
        except ResourceError:  # a replica was lost, as the view tells
            experts = ["busiest experts: unknown, since not all replicas answer"]
        return "\n".join([*_lines(view, rates), *experts])


def _read(args: argparse.Namespace, path: str) -> Json:
    key = args.api_key or next((os.environ[name] for name in _KEY_VARIABLES if os.environ.get(name)), "")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    base = args.url if "://" in args.url else f"http://{args.url}"
    request = urllib.request.Request(base.rstrip("/").removesuffix("/v1") + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            read: Json = json.load(answer)
            return read
    except urllib.error.HTTPError as error:
        hint = (
            f"give --api-key, or {_KEY_VARIABLES[0]} in the environment"
            if error.code == 401
            else _message(error) or "is this a qwen3-dist service?"
        )
        raise ResourceError(f"{args.url} answers {error.code} for {path}; {hint}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ResourceError(f"no service answers at {args.url} ({reason}); check the address") from None


def _message(error: urllib.error.HTTPError) -> str:
    """The sentence of an error of the service; "" if it is another server's."""
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return ""


def _answering(view: Json) -> Iterator[Json]:
    """The replicas that told their load."""
    for model in view["models"]:
        yield from (replica for replica in model["replicas"] if "load" in replica)


def _rates(view: Json, earlier: dict[str, Json], seconds: float) -> dict[str, dict[str, float]]:
    """Tokens and steps a second of each replica since the view before; none for a replica that is new."""
    return {
        replica["id"]: {
            name: (replica["load"][name] - earlier[replica["id"]][name]) / seconds
            for name in ("prompt_tokens", "generation_tokens", "steps")
        }
        for replica in _answering(view)
        if replica["id"] in earlier
    }


def _lines(view: Json, rates: dict[str, dict[str, float]]) -> Iterator[str]:
    ingress = view["ingress"]
    yield f"up {view['uptime_s']:.0f} s, {ingress['in_flight']} of {ingress['limit']} sequences in flight"
    for model in view["models"]:
        count = f"{model['replicas_running']} of {model['min_replicas']} to {model['max_replicas']} replicas"
        yield f"{model['id']}: {model['status']}, {count}"
        if model.get("waits_for"):
            yield f"  a replica waits for room for {model['waits_for']}"
        yield _HEADING
        for replica in model["replicas"]:
            if "load" not in replica:
                yield f"  {'?':<10} {_first_line(replica['message'])}"
                continue
            load, rate = replica["load"], rates.get(replica["id"], {})
            shown = [
                f"{rate[name]:.0f}" if name in rate else "-"
                for name in ("generation_tokens", "prompt_tokens", "steps")
            ]
            yield (
                f"  {replica['id']:<10} {replica['layout']:<14} {load['num_requests_running']:>7}"
                f" {load['num_requests_waiting']:>7} {load['kv_cache_usage']:>5.0%}"
                f" {shown[0]:>9} {shown[1]:>9} {shown[2]:>8}"
            )
            if slowest := replica.get("slowest_rank"):
                yield f"  {'':<10} slowest rank {slowest['rank']} ({slowest['excess']:+.0%})"
            if replica["message"]:
                yield f"  {'':<10} {_first_line(replica['message'])}"


def _first_line(message: str) -> str:
    """The first line of a message, which may be one of Ray's with many."""
    return message.strip().partition("\n")[0]


def _expert_lines(experts: Json) -> Iterator[str]:
    """The layers whose busiest expert is furthest above the mean, of all replicas together."""
    loads: dict[str, list[int]] = {}
    for replica in experts["data"]:
        for layer, tokens in replica["tokens"].items():
            earlier = loads.get(layer, [0] * len(tokens))
            loads[layer] = [sum(both) for both in zip(earlier, tokens, strict=True)]
    heat = []
    for name, counts in loads.items():
        if total := sum(counts):
            busiest = max(range(len(counts)), key=counts.__getitem__)
            heat.append((counts[busiest] * len(counts) / total, name, busiest))
    if heat:
        yield "busiest experts, times the mean: " + ", ".join(
            f"layer {name} expert {expert} {times:.1f}x"
            for times, name, expert in sorted(heat, reverse=True)[:5]
        )
