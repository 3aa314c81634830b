"""A service with more clients than it can run: goodput, time to a refusal, and latency of `/health`.

    python -m benchmarks.overload [--running 64] [--waiting 64] [--loads 1 10 1] [--seconds 20] [--arrive 5]

One replica of the bundled model. A load of 10 means ten times as many clients as sequences may run. Each client
streams one completion after the other, and waits for Retry-After when it is refused with 429. Clients and service
share this machine's cores, so part of the loss at high load is due to the clients.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlparse

from benchmarks.record import keep
from qwen3_dist.percentiles import percentile
from serve_app.launch.foreground import running_service
from serve_app.settings import read_service_config

PORT = 8794
_PROBE_EVERY_S = 0.25
_TIMEOUT_S = 60.0


@dataclass
class Observed:
    """What the clients of one load observed, in seconds. `finished` counts requests that end in the second half."""

    finished: int = 0
    failed: list[str] = field(default_factory=list)
    refused_after: list[float] = field(default_factory=list)
    first_part_after: list[float] = field(default_factory=list)
    health_after: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Load:
    """`clients` clients that start evenly within `arrive_s` and send one request after the other until `seconds`."""

    clients: int
    seconds: float
    arrive_s: float
    output_len: int


async def exchange(url: str, request: bytes, on_body: Callable[[], None]) -> tuple[bytes, bytes]:
    """Sends one request. Calls `on_body` at the first byte of the body. Returns head and body."""
    address = urlparse(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.read(1)
        on_body()
        return head, body + await reader.read()
    finally:
        writer.close()


def retry_after_s(head: bytes) -> float:
    lines = head.decode().lower().split("\r\n")
    return next(float(line.partition(":")[2]) for line in lines if line.startswith("retry-after:"))


async def client(url: str, request: bytes, half: float, until: float, seen: Observed) -> None:
    """Sends requests until `until`. Counts those that end after `half`. Both are times of the monotonic clock."""
    while time.monotonic() < until:
        started, first = time.monotonic(), [0.0]

        def on_body(started: float = started, first: list[float] = first) -> None:
            first[0] = time.monotonic() - started

        try:
            head, body = await asyncio.wait_for(exchange(url, request, on_body), _TIMEOUT_S)
        except (OSError, EOFError, TimeoutError) as error:
            seen.failed.append(repr(error))
            continue
        if head.startswith(b"HTTP/1.1 429"):
            seen.refused_after.append(first[0])
            await asyncio.sleep(retry_after_s(head))
        elif head.startswith(b"HTTP/1.1 200") and b"[DONE]" in body:
            seen.first_part_after.append(first[0])
            seen.finished += half < time.monotonic() < until
        else:
            seen.failed.append((head + body)[:200].decode(errors="replace"))


async def probe(url: str, until: float, seen: Observed) -> None:
    """Polls `/health` until `until`."""
    request = f"GET /health HTTP/1.1\r\nHost: {urlparse(url).netloc}\r\nConnection: close\r\n\r\n".encode()
    while time.monotonic() < until:
        started = time.monotonic()
        try:
            head, _ = await asyncio.wait_for(exchange(url, request, lambda: None), _TIMEOUT_S)
            seen.health_after.append(time.monotonic() - started)
            if not head.startswith(b"HTTP/1.1 200"):
                seen.failed.append(f"/health: {head[:100]!r}")
        except (OSError, EOFError, TimeoutError) as error:
            seen.failed.append(f"/health: {error!r}")
        await asyncio.sleep(_PROBE_EVERY_S)


async def run(url: str, load: Load) -> Observed:
    body = {"model": "m", "prompt": "Hello", "max_tokens": load.output_len, "temperature": 0}
    payload = json.dumps({**body, "ignore_eos": True, "stream": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {urlparse(url).netloc}\r\nContent-Type: application/json\r\n"
    )
    request = f"{head}Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n".encode() + payload
    seen, until = Observed(), time.monotonic() + load.seconds

    async def arrive(after_s: float) -> None:
        await asyncio.sleep(after_s)
        await client(url, request, until - load.seconds / 2, until, seen)

    arrivals = [load.arrive_s * at / load.clients for at in range(load.clients)]
    await asyncio.gather(probe(url, until, seen), *map(arrive, arrivals))
    return seen


def client_process(url: str, loads: list[Load], found: Any) -> None:
    """Warms the service up, then puts the observations at each load into the queue `found`."""
    asyncio.run(run(url, Load(8, 3.0, 0.0, 8)))
    for load in loads:
        found.put(asyncio.run(run(url, load)))  # returns when all its requests have ended


def quantiles_ms(samples: list[float]) -> str:
    """p50 / p99 / maximum of `samples` (in seconds), as text in milliseconds."""
    if not samples:
        return "-"
    ordered = sorted(samples)
    return " / ".join(f"{1e3 * percentile(ordered, percent):.0f}" for percent in (50, 99, 100))


def row(load: Load, seen: Observed, first: Observed) -> dict[str, Any]:
    return {
        "clients": load.clients,
        "finished_per_s": round(seen.finished / (load.seconds / 2), 1),
        "goodput_over_first": round(seen.finished / max(first.finished, 1), 2),
        "refused": len(seen.refused_after),
        "failed": len(seen.failed),
        "refused_after_ms": quantiles_ms(seen.refused_after),
        "first_part_ms": quantiles_ms(seen.first_part_after),
        "health_ms": quantiles_ms(seen.health_after),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--running", type=int, default=64, help="max_ongoing_requests and max_num_seqs")
    parser.add_argument("--waiting", type=int, default=64, help="max_queued_requests")
    parser.add_argument(
        "--loads", type=float, nargs="+", default=[1, 10, 1], help="clients as multiples of --running"
    )
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--arrive", type=float, default=5.0, help="seconds within which the clients start")
    parser.add_argument("--output-len", type=int, default=100)
    args = parser.parse_args()
    loads = [
        Load(round(args.running * load), args.seconds, args.arrive, args.output_len) for load in args.loads
    ]
    settings = {"max_ongoing_requests": args.running, "max_queued_requests": args.waiting}
    settings["max_num_seqs"] = args.running
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    with running_service(read_service_config({**settings, "port": PORT, "model_name": "m"})) as service:
        process = context.Process(target=client_process, args=(service.url, loads, found))
        process.start()
        seen = [found.get(timeout=10 * args.seconds + 300) for _ in loads]
        process.join()
    for each in seen:
        for reason in sorted(set(each.failed))[:5]:
            print(f"failed: {reason}")
    keep("overload", [row(load, each, seen[0]) for load, each in zip(loads, seen, strict=True)])


if __name__ == "__main__":
    main()
