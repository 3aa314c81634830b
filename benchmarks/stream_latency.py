"""Time to first token and gaps between parts of streams over HTTP, against the engine alone, and what each hop costs.

    python -m benchmarks.stream_latency [--clients 10 32 128] [--seconds 15] [--haproxy]

A step takes 20 ms and no CPU time (`benchmarks/paced.py`). Ray, the service and its proxy share one core; the clients
and the rank have the other. Each client streams chats of about 200 tokens, one after the other, on one connection.
CPU time is that of the processes of each hop, divided by the tokens that were streamed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from benchmarks.paced import STEP_S, PacedReplica, pace
from benchmarks.record import keep
from cluster.ray_private import HAPROXY
from qwen3_dist import SamplingParams
from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.settings import EngineConfig
from serve_app import app
from serve_app.launch.foreground import running_service
from serve_app.settings import read_service_config

PORT = 8794
_GOLDEN = (math.sqrt(5) - 1) / 2  # the fractions of its multiples are spread evenly, however many are taken
_LAST_CHUNK = b"\r\n0\r\n\r\n"
OUTPUT_LEN = (150, 250)  # tokens of an answer, from and to
ENGINE: dict[str, Any] = {"num_blocks": 8192, "max_num_seqs": 256, "device": "cpu", "prefix_caching": False}
HOPS = {"EngineReplica": "replica", "Ingress": "ingress", "Proxy": "proxy", "haproxy": "proxy"}


@dataclass
class Times:
    """What the clients saw, in seconds: until the first part of each stream, and between two parts."""

    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    num_parts: int = 0  # of all streams, also of those that are not counted in the times

    def of(self, began: float, parts: list[float]) -> None:
        """Adds a stream that was asked for at `began` and whose parts came at these times."""
        self.first.append(parts[0] - began)
        self.gaps += [after - before for before, after in zip(parts, parts[1:], strict=False)]

    def summary(self) -> dict[str, float]:
        """Quantiles in milliseconds."""
        found = {"ttft_mean_ms": statistics.mean(self.first)}
        for name, values in (("ttft", self.first), ("gap", self.gaps)):
            found |= {f"{name}_p{p}_ms": statistics.quantiles(values, n=100)[p - 1] for p in (50, 90, 99)}
        return {name: round(value * 1e3, 2) for name, value in found.items()} | {"streams": len(self.first)}


async def run_clients(
    stream: Callable[[int, random.Random], Awaitable[list[float]]], clients: int, seconds: float
) -> Times:
    """Has each client stream one answer after the other for so many seconds; the first of each is not counted."""
    times, end, asked = Times(), time.perf_counter() + seconds, count()

    async def client(index: int) -> None:
        rng = random.Random(index)
        await asyncio.sleep(rng.uniform(0.0, sum(OUTPUT_LEN) / 2 * STEP_S))
        counted = False
        while time.perf_counter() < end:
            await asyncio.sleep(next(asked) * _GOLDEN % 1.0 * STEP_S)  # evenly spread over the time of a step
            began = time.perf_counter()
            parts = await stream(rng.randint(*OUTPUT_LEN), rng)
            times.num_parts += len(parts)
            if counted:
                times.of(began, parts)
            counted = True

    await asyncio.gather(*(client(index) for index in range(clients)))
    return times


class _Client(asyncio.Protocol):
    """A connection that a client keeps, as client libraries do. A bare socket, since these would use more CPU time
    than the server."""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    async def stream(self, request: bytes) -> list[float]:
        """When each part of the answer to `request` arrived."""
        self._seen, self._parts = b"", list[float]()
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._end
        return self._parts

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        assert self._seen or data.startswith(b"HTTP/1.1 200"), data[:300]
        self._parts += [now] * data.count(b'"delta":{"content"')
        self._seen = self._seen[-len(_LAST_CHUNK) :] + data
        if self._seen.endswith(_LAST_CHUNK):
            self._end.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._end.done():
            self._end.set_exception(ConnectionError(f"the connection was lost: {error}"))


async def http_clients(url: str, clients: int, seconds: float) -> Times:
    """Streams chats over HTTP, those of each client on one connection."""
    address = urlparse(url)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
    )

    connections: dict[random.Random, _Client] = {}

    async def stream(tokens: int, rng: random.Random) -> list[float]:
        body = {
            "model": "m",
            "messages": [{"role": "user", "content": f"Tell me a story about a fox, number {rng.random()}."}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
        }
        payload = json.dumps(body).encode()
        request = f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload
        if rng not in connections:
            create = asyncio.get_running_loop().create_connection
            _, connections[rng] = await create(_Client, str(address.hostname), address.port or 80)
        parts = await connections[rng].stream(request)
        assert len(parts) > 0.8 * tokens, (len(parts), tokens)
        return parts

    return await run_clients(stream, clients, seconds)


async def engine_clients(engine: AsyncEngine, clients: int, seconds: float) -> Times:
    """Streams from an engine in this process."""
    names = iter(range(10**9))

    async def stream(tokens: int, rng: random.Random) -> list[float]:
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        parts = []
        prompt = [rng.randint(300, 800) for _ in range(30)]
        async with aclosing(engine.generate(prompt, params, str(next(names)))) as steps:
            async for _ in steps:
                parts.append(time.perf_counter())
        return parts

    return await run_clients(stream, clients, seconds)


def measure_engine(clients: list[int], seconds: float, found: Any) -> None:
    """Runs in a process of its own."""
    pace()
    engine = AsyncEngine(EngineConfig(executor="processes", threads_per_rank=1, **ENGINE))
    for number in clients:
        found.put(asyncio.run(engine_clients(engine, number, seconds)).summary())
    engine.shutdown()


def measure_http(url: str, clients: int, seconds: float, found: Any) -> None:
    """Runs in a process of its own, on the last core."""
    os.sched_setaffinity(0, {(os.cpu_count() or 1) - 1})
    times = asyncio.run(http_clients(url, clients, seconds))
    found.put((times.summary(), times.num_parts))


def cpu_seconds() -> dict[str, float]:
    """CPU time of the processes of each hop so far."""
    found = dict.fromkeys([*HOPS.values(), "ray"], 0.0)
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (process / "cmdline").read_bytes().decode(errors="replace")
            if "ray" in command or "haproxy" in command:
                hop = next((hop for name, hop in HOPS.items() if name in command), "ray")
                user, system = (process / "stat").read_text().rpartition(")")[2].split()[11:13]
                found[hop] += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return found


@contextmanager
def one_core() -> Iterator[None]:
    """A context in which this process, and those that it starts, share the first core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {0})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def in_process(function: Callable[..., None], *arguments: Any, results: int) -> list[Any]:
    """What `function` puts on a queue in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=function, args=(*arguments, queue))
    process.start()
    found = [queue.get(timeout=600) for _ in range(results)]
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 32, 128])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--haproxy", action="store_true", help="use Serve's HAProxy")
    args = parser.parse_args()
    os.environ[HAPROXY] = str(int(args.haproxy))
    with one_core():
        alone = in_process(measure_engine, args.clients, args.seconds, results=len(args.clients))
    app.EngineReplica = PacedReplica  # type: ignore[misc]
    settings = {**ENGINE, "port": PORT, "model_name": "m", "stream_parts_per_s": 0, "threads_per_rank": 1}
    rows = []
    with one_core(), running_service(read_service_config(settings)) as service:
        in_process(measure_http, service.url, 4, 15.0, results=1)  # warms up
        for clients, engine in zip(args.clients, alone, strict=True):
            before = cpu_seconds()
            [(http, parts)] = in_process(measure_http, service.url, clients, args.seconds, results=1)
            spent = {hop: after - before[hop] for hop, after in cpu_seconds().items()}
            rows.append(
                {
                    "clients": clients,
                    "proxy": "HAProxy" if args.haproxy else "Serve",
                    "engine": engine,
                    "http": http,
                    "http_over_engine": {n: round(http[n] / engine[n], 3) for n in engine if n != "streams"},
                    "cpu_us_per_part": {hop: round(cpu / parts * 1e6, 1) for hop, cpu in spent.items()},
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    keep("stream-latency-haproxy" if args.haproxy else "stream-latency", rows)


if __name__ == "__main__":
    main()
