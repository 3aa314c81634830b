"""Kills, stops and changes parts of a service under load, and compares each answer with the undisturbed one.

    python -m benchmarks.chaos [--clients 16] [--times 3] [--faults kill-rank stop-rank kill-replica] [--replicas 2]

A fault is `none`; kill (SIGKILL), stop (SIGSTOP) or term (SIGTERM) of a rank, a replica, an ingress, Serve's proxy or
its controller; `drop`, which breaks the connections between an ingress and a replica (as root, with `ss`); `roll`, a
deployment that loads the model anew; `layout`, which gives replicas one rank each and then their layout again; or
`scale`, which takes a replica away and gives it back.

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
import random
import signal
import statistics
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx

from benchmarks.chaos_answers import MODEL, LostError, difference, read_stream, requests, same, without_ids
from cluster import ray_cluster, ray_private
from serve_app.ingress import proxy
from serve_app.launch.deploy import deploy, stop
from serve_app.settings import INGRESS, REPLICA, read_service_config

FAULTS = (
    *("none", "kill-rank", "stop-rank", "kill-replica", "stop-replica", "term-replica", "kill-ingress"),
    *("kill-proxy", "kill-controller", "drop", "roll", "layout", "scale"),
)
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


def titled(words: str) -> list[int]:
    """Processes that this one has started and nobody has stopped, of whose titles `words` is a part."""
    found, left = [], [os.getpid()]
    while left:
        for file in Path(f"/proc/{left.pop()}/task").glob("*/children"):
            try:
                children = [int(child) for child in file.read_text().split()]
            except OSError:
                continue
            left += children
            for child in children:
                path = Path(f"/proc/{child}")
                with contextlib.suppress(OSError):  # it has ended
                    stopped = "State:\tT" in (path / "status").read_text()
                    if not stopped and words in (path / "cmdline").read_text(errors="replace"):
                        found.append(child)
    return found


TITLES = {
    "replica": f":{REPLICA}",
    "ingress": f":{INGRESS}",
    "proxy": "ProxyActor",
    "controller": "ServeController",
}


def _signal(kind: str, ranks: list[list[int]]) -> None:
    """Sends the signal that `kind` names to one process."""
    action, _, what = kind.partition("-")
    number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}[action]
    pids = random.choice(ranks) if what == "rank" else titled(TITLES[what])
    os.kill(random.choice(pids), number)


def _sockets(state: str, pid: int) -> list[tuple[str, str]]:
    """The local and the peer's port of each TCP socket of a process in `state`."""
    lines = subprocess.run(["ss", "-tnpH", "state", state], capture_output=True, text=True, check=True).stdout
    columns = [line.split() for line in lines.splitlines() if f"pid={pid}," in line]
    return [(local.rpartition(":")[2], peer.rpartition(":")[2]) for _, _, local, peer, *_ in columns]


def _drop() -> None:
    """Breaks all connections between one ingress and one replica."""
    ingress, replica = (random.choice(titled(TITLES[each])) for each in ("ingress", "replica"))
    served = {port for port, _ in _sockets("listening", replica)}
    found = [port for port, peer in _sockets("established", ingress) if peer in served]
    for port in found:
        subprocess.run(["ss", "-K", "sport", "=", port], capture_output=True, check=True)
    left = {port for port, _ in _sockets("established", ingress)}
    assert found and not left & set(found), "ss did not close the connections"


class Service:
    """The service that is disturbed. `change` deploys it with other settings."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self.url = self.change()

    def change(self, **settings: Any) -> str:
        self._settings |= settings
        return deploy(read_service_config(self._settings), report=print)

    def roll(self) -> None:
        """Loads the model anew, for one KV block more."""
        self.change(num_blocks=self._settings["num_blocks"] + 1)

    def layout(self) -> None:
        """Loads the model with one rank, and again with its layout."""
        usual = self._settings["layout"]
        for layout in ("tp=1", usual):
            self.change(layout=layout)

    def scale(self) -> None:
        """Takes a replica away, and gives it back."""
        replicas = self._settings["min_replicas"]
        for number in (replicas - 1, replicas):
            self.change(min_replicas=number, max_replicas=number)


async def strike(load: Load, service: Service, kind: str, replicas: int, seconds: float) -> None:
    """One fault, then waits until all replicas are back and answers flow again."""
    await asyncio.sleep(seconds)
    before = await load.ranks()
    load.fault_s = time.monotonic()
    if kind in ("roll", "layout", "scale"):
        await asyncio.to_thread(getattr(service, kind))
    elif kind == "drop":
        _drop()
    elif kind != "none":
        _signal(kind, before)
    if kind != "none":
        deadline = load.fault_s + RECOVERY_S
        known = {pid for pids in before for pid in pids}
        changes = kind.endswith(("rank", "replica"))
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
    parser.add_argument("--ingresses", type=int, default=1)
    parser.add_argument("--layout", default="tp=1")
    parser.add_argument(
        "--faults",
        nargs="+",
        default=FAULTS,
    )
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
        "cpus_per_rank": 0.1,
        "prefix_caching": False,  # usage tells of cached tokens
        "ingress_replicas": args.ingresses,
        "health_check_timeout_s": 5,  # a stopped replica is found after this time
        "graceful_shutdown_timeout_s": 60,
    }
    os.environ.setdefault(ray_private.PROXY_MIDDLEWARES, proxy.IMPORT_PATH)
    ray_cluster.connect(None)
    try:
        found = asyncio.run(run(Service(settings), args))
        stop(settings["name"], print, stop_now=lambda: False)
    finally:
        ray_cluster.shutdown()
    print(HEAD)
    for kind, fault in found.items():
        print(fault.row(kind))


if __name__ == "__main__":
    main()
