"""Kills, stops and changes parts of a service under load, and compares each answer with the undisturbed one.

    python -m benchmarks.chaos [--clients 16] [--times 3] [--faults kill-rank stop-rank kill-replica] [--replicas 2]

A fault is `none`; kill (SIGKILL), stop (SIGSTOP) or term (SIGTERM) of a rank, a replica, an ingress, Serve's proxy or
its controller; `drop`, which breaks the connections between an ingress and a replica (as root, with `ss`); `roll`, a
deployment that loads the model anew; `layout`, which gives replicas one rank each and then their layout again;
`scale`, which takes a replica away and gives it back; with a --layout of several dp groups, `groups`: a rank is
killed, and so is each that starts in its place, until the replica goes on without the dp group; with --nodes,
`kill-raylet`: a node is lost, and another one has room.

A client asks for one answer after the other: chats with tools, a schema, thinking, two choices and log-probabilities,
completions of several prompts with stop strings, responses and messages; greedy and seeded, streamed and not. Each
answer is asked for once before the first fault. A client whose connection breaks, or that is told to try again, sends
the request again with its `X-Request-Id`. One row is printed for each kind of fault: requests that were sent again,
answers that were lost all the same, that changed, and for how long streams paused.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import httpx

from benchmarks.chaos_answers import MODEL, LostError, difference, read_stream, requests, same, without_ids
from benchmarks.chaos_faults import FAULTS, Nodes, Service
from cluster import ray_cluster, ray_private
from qwen3_dist.layout import Layout
from serve_app.ingress import proxy
from serve_app.launch.deploy import stop

PORT = 8795
TRIES = 30  # of a client whose connection breaks, a second apart
PAUSE_S = 1.0  # streams that paused for less count as undisturbed
RECOVERY_S = 120.0


@dataclass
class Fault:
    """What clients saw of the faults of one kind."""

    answers: int = 0
    again: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    pauses_s: list[float] = field(default_factory=list)
    recoveries_s: list[float] = field(default_factory=list)

    def row(self, name: str) -> str:
        """One row of the table, whose columns HEAD names."""
        pauses = sorted(self.pauses_s)
        paused = f"{statistics.median(pauses):.1f} | {pauses[-1]:.1f}" if pauses else "- | -"
        whole = f"{max(self.recoveries_s):.1f}" if self.recoveries_s else "-"
        counts = (
            f"{self.answers} | {len(self.again)} | {len(self.lost)} | {len(self.changed)} | {len(pauses)}"
        )
        return f"| {name} | {counts} | {paused} | {whole} |"


HEAD = (
    "| fault | answers | sent again | lost | changed | paused | p50 s | worst s | all back, s |\n"
    + "|---" * 9
    + "|"
)


class Load:
    """Clients that ask one request after the other, until `end`."""

    def __init__(self, url: str, asked: list[tuple[str, str, dict[str, Any]]] | None = None) -> None:
        self._http = httpx.AsyncClient(
            base_url=url, timeout=RECOVERY_S, limits=httpx.Limits(max_connections=None)
        )
        self._expected: dict[str, Any] = {}
        self._requests = asked or requests()
        self.fault, self.fault_s = Fault(), float("inf")
        self.ended = False

    async def ask(
        self, name: str, path: str, body: dict[str, Any], request_id: str = ""
    ) -> tuple[Any, float]:
        """The answer, and the longest time between two of its parts since the fault. Raises LostError."""
        headers = {"X-Request-Id": request_id} if request_id else {}
        if not body.get("stream"):
            answer = await self._http.post(path, json=body, headers=headers)
            if answer.status_code != HTTPStatus.OK:
                raise LostError(f"{answer.status_code} {answer.text}")
            return without_ids(answer.json()), 0.0
        data, last, pause = b"", time.monotonic(), 0.0
        async with self._http.stream("POST", path, json=body, headers=headers) as answer:
            if answer.status_code != HTTPStatus.OK:
                raise LostError(f"{answer.status_code} {(await answer.aread()).decode()}")
            async for part in answer.aiter_bytes():
                now = time.monotonic()
                if data and part != b": ping\n\n":
                    if now > self.fault_s:
                        pause = max(pause, now - max(last, self.fault_s))
                    last = now
                data += part
        return without_ids(read_stream(path, data)), pause

    async def expect(self) -> None:
        """Asks for each answer once."""
        for request in self._requests:
            self._expected[request[0]], _ = await self.ask(*request)

    async def client(self, number: int) -> None:
        """Asks one request after the other, beginning with that of this number, until `ended`."""
        for name, path, body in self._turns(number):
            if self.ended:
                return
            request_id = f"chaos-{uuid.uuid4().hex}"
            for left in reversed(range(TRIES)):
                try:
                    answer, pause = await self.ask(name, path, body, request_id)
                    break
                except (LostError, httpx.HTTPError) as error:
                    kept = self.fault.again if left else self.fault.lost
                    kept.append(f"{name}: {error!r}"[:400])
                    await asyncio.sleep(1.0)
            else:
                answer, pause = None, 0.0
            self.fault.answers += 1
            if answer is not None and not same(answer, self._expected[name]):
                self.fault.changed.append(f"{name}: {difference(self._expected[name], answer)}")
            if pause > PAUSE_S:
                self.fault.pauses_s.append(pause)

    def _turns(self, number: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
        while True:
            yield self._requests[number % len(self._requests)]
            number += 1

    async def view(self) -> dict[str, Any]:
        """The service's view of itself, in which the models are one."""
        while True:
            with contextlib.suppress(httpx.HTTPError):
                answer = await self._http.get("/v1/cluster", timeout=15)
                if answer.status_code == HTTPStatus.OK:
                    found: dict[str, Any] = answer.json()
                    return found
            await asyncio.sleep(0.2)

    async def ranks(self) -> list[list[int]]:
        """Process ids of the ranks of each healthy replica."""
        [model] = (await self.view())["models"]
        return [[rank["pid"] for rank in each["ranks"]] for each in model["replicas"] if each["healthy"]]

    async def left(self) -> tuple[int, int]:
        """Sequences that the ingresses and the engines still have, some time after the last answer."""
        for _ in range(40):
            view = await self.view()
            [model] = view["models"]
            loads = [each["load"] for each in model["replicas"] if "load" in each]
            held = sum(each["num_requests_running"] + each["num_requests_waiting"] for each in loads)
            if (found := (view["ingress"]["in_flight"], held)) == (0, 0):
                break
            await asyncio.sleep(0.25)
        return found


async def strike(load: Load, service: Service, kind: str, replicas: int, seconds: float) -> None:
    """One fault, then waits until all replicas are back and answers flow again."""
    await asyncio.sleep(seconds)
    before = await load.ranks()
    load.fault_s = time.monotonic()
    await asyncio.to_thread(service.strike, kind, before)
    if kind != "none":
        deadline = load.fault_s + RECOVERY_S
        known = {pid for pids in before for pid in pids}
        changes = kind.endswith(("rank", "replica", "raylet"))
        while time.monotonic() < deadline:
            await asyncio.sleep(0.2)
            now = await load.ranks()
            if len(now) >= replicas and not (changes and {pid for pids in now for pid in pids} == known):
                break
        load.fault.recoveries_s.append(time.monotonic() - load.fault_s)
    await asyncio.sleep(seconds)


async def run(service: Service, args: argparse.Namespace) -> dict[str, Fault]:
    """Runs all faults, each under the load of so many clients."""
    load = Load(service.url)
    began = time.monotonic()
    await load.expect()
    print(f"each answer once: {time.monotonic() - began:.1f} s", flush=True)
    found: dict[str, Fault] = {}
    for kind in args.faults:
        for _ in range(args.times):
            load.fault, load.fault_s, load.ended = found.setdefault(kind, Fault()), float("inf"), False
            clients = [asyncio.create_task(load.client(number)) for number in range(args.clients)]
            await strike(load, service, kind, args.replicas, args.seconds)
            load.ended = True
            await asyncio.gather(*clients)
        fault = found[kind]
        print(fault.row(kind), flush=True)
        for line in [*fault.again[:3], *fault.lost[:6], *fault.changed[:6]]:
            print("   ", line, flush=True)
        print("    left in ingresses and engines:", await load.left(), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--times", type=int, default=3, help="faults of each kind")
    parser.add_argument("--seconds", type=float, default=5.0, help="before and after each fault")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--ingresses", type=int, help="2 with --nodes, else 1")
    parser.add_argument("--layout", default="tp=1")
    parser.add_argument("--faults", nargs="+", default=FAULTS)
    parser.add_argument("--nodes", action="store_true", help="one Ray node for each replica and fault")
    args = parser.parse_args()
    settings = {
        "name": "chaos",
        "port": PORT,
        "model_name": MODEL,
        "layout": args.layout,
        "device": "cpu",
        "dtype": "float32",
        "num_blocks": 2048,
        "threads_per_rank": 1,
        "min_replicas": args.replicas,
        "max_replicas": args.replicas,
        "cpus_per_rank": (0.8 if args.nodes else 0.2) / Layout.parse(args.layout).world,
        "prefix_caching": False,  # usage tells of cached tokens
        "ingress_replicas": args.ingresses or (2 if args.nodes else 1),
        "health_check_timeout_s": 5,  # a stopped replica is found after this time
        "graceful_shutdown_timeout_s": 60,
    }
    for name, value in {
        **ray_private.CLUSTER_ENVIRONMENT,
        ray_private.PROXY_MIDDLEWARES: proxy.IMPORT_PATH,
    }.items():
        os.environ.setdefault(name, value)
    nodes = Nodes(args.replicas + args.times) if args.nodes else None
    ray_cluster.connect(nodes.address if nodes else None)
    try:
        found = asyncio.run(run(Service(settings, nodes), args))
        stop(settings["name"], print, stop_now=lambda: False)
    finally:
        ray_cluster.shutdown()
        if nodes:
            nodes.end()
    print(HEAD)
    for kind, fault in found.items():
        print(fault.row(kind))


if __name__ == "__main__":
    main()
