"""Mixed load for a long time, good clients and bad ones, then goodput at 1, 2, 4 and 10 times the capacity.

    python -m benchmarks.load [--minutes 30] [--loads 1 2 4 10] [--seconds 20]

Two replicas of the bundled model. First, for so many minutes, at once:

- clients that ask what `benchmarks.chaos` asks, embeddings too, one answer after the other, and compare each answer
  with the one before the load;
- clients that cancel, that read slowly or nothing, that send headers or bodies slowly or random bytes, and 1,000
  connections on which nothing is sent (`benchmarks/rough_clients.py`).

`/health` is asked four times a second all the while, and the private memory of each process is noted. When all
clients are gone, ingresses and engines must hold no request, processes no more sockets than before, and the same
processes must run. Then `benchmarks.overload` measures how many tokens complete with so many times the clients that
fit. Clients and service share this machine's cores. The exit status is 1 if an answer was lost or changed, `/health`
failed or something was left.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks import chaos, overload
from benchmarks.chaos_answers import MODEL, requests
from benchmarks.processes import open_sockets, private_bytes, started
from benchmarks.record import run_info, write
from benchmarks.rough_clients import BODY_TIMEOUT_S, WRITE_TIMEOUT_S, Rough
from serve_app.launch.foreground import running_service
from serve_app.settings import read_service_config

PORT = 8796
RUNNING, WAITING = 16, 32  # sequences that each replica runs at once, and that may wait
OUTPUT_LEN = 100
ASKED = [*requests(), ("embedding", "/v1/embeddings", {"model": MODEL, "input": ["the sea", "a fox"]})]
CLIENTS = {"cancel": 4, "read_slowly": 2, "never_read": 4, "babble": 2, "idle": 1000}
SLOW_HEADERS, SLOW_BODIES = 50, 4
_SAMPLE_S = 2.0
_WARM_UP_S = 30.0  # in which processes open the connections that they keep
_SETTLE_S = 30.0  # longest wait for the proxy to close the connections of clients that are gone
_STEADY_S = 3.0  # without a change of the sockets, after which they have settled
_RAYS_OWN = 2  # sockets of a process that come and go
_MIB = 2**20
# What may become of bad clients. Bytes that begin no request may be answered, or waited for to end.
USUAL = {
    "cancelled": ("200",),
    "slow readers": ("200, to its end",),
    "read nothing": ("closed",),
    "slow headers": ("held to the end",),
    "slow bodies": ("408", "no answer"),  # the second as the clients end
    "idle": ("held to the end",),
    "random bytes": ("400", "closed", "no answer"),
}
_OUR_OWN = ("multiprocessing", "ray::IDLE")  # clients, and workers that Ray keeps for the next task
SETTINGS = {
    "port": PORT,
    "model_name": MODEL,
    "device": "cpu",
    "dtype": "float32",
    "layout": "tp=1",
    "num_blocks": 2048,
    "threads_per_rank": 1,
    "min_replicas": 2,
    "max_replicas": 2,
    "cpus_per_rank": 0.1,
    "prefix_caching": False,  # usage tells of cached tokens
    "max_num_seqs": RUNNING,
    "max_ongoing_requests": RUNNING,
    "max_queued_requests": WAITING,
    "write_timeout_s": WRITE_TIMEOUT_S,
    "body_timeout_s": BODY_TIMEOUT_S,
}


@dataclass
class Memory:
    """A context in which a thread notes the private memory of each process of the service."""

    titles: dict[int, str] = field(default_factory=dict)
    samples: dict[int, list[tuple[float, int]]] = field(default_factory=dict)
    _ended: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        while not self._ended.wait(_SAMPLE_S):
            for pid, title in service_processes().items():
                self.titles[pid] = title
                self.samples.setdefault(pid, []).append((time.monotonic(), private_bytes(pid)))

    def __enter__(self) -> Memory:
        self._watching = threading.Thread(target=self.watch)
        self._watching.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._watching.join()

    def rows(self, ranks: Collection[int]) -> Iterator[dict[str, Any]]:
        """Of processes above 30 MiB: memory at eleven times, and its slope in the second half."""
        for pid, samples in sorted(self.samples.items()):
            late = samples[len(samples) // 2 :]
            if len(late) > 2 and late[-1][1] > 30 * _MIB:
                slope = statistics.linear_regression(*zip(*late, strict=True)).slope
                at = [samples[round(tenth * (len(samples) - 1) / 10)][1] for tenth in range(11)]
                yield {
                    "process": "rank" if pid in ranks else name_of(self.titles[pid]),
                    "mib": [round(each / _MIB, 1) for each in at],
                    "slope_mib_per_h": round(3600 * slope / _MIB, 1),
                }


def name_of(title: str) -> str:
    """The first two words of a process's title that are no options, without folders."""
    words = [word.rpartition("/")[2] for word in title.split() if not word.startswith("-")]
    return " ".join(words[:2])


def service_processes() -> dict[int, str]:
    return {pid: title for pid, title in started().items() if not any(word in title for word in _OUR_OWN)}


async def mixed(url: str, good: int, until: float) -> dict[str, Any]:
    """All clients at once."""
    load = chaos.Load(url, ASKED)
    await load.expect()
    rough = Rough(url, until)
    tasks = [asyncio.create_task(load.client(number)) for number in range(good)]
    tasks += [
        asyncio.create_task(getattr(rough, kind)()) for kind, count in CLIENTS.items() for _ in range(count)
    ]
    for count, body in ((SLOW_HEADERS, False), (SLOW_BODIES, True)):
        tasks += [asyncio.create_task(rough.send_slowly(body)) for _ in range(count)]
    await asyncio.sleep(max(0.0, until - time.monotonic()))
    load.ended = True
    await asyncio.gather(*tasks)
    fault = load.fault
    return {
        "answers": fault.answers,
        "sent_again": fault.again,
        "lost": fault.lost,
        "changed": fault.changed,
        "bad_clients": {kind: dict(counts) for kind, counts in sorted(rough.seen.items())},
    }


def mixed_process(url: str, good: int, until: float, found: Any) -> None:
    found.put(asyncio.run(mixed(url, good, until)))


def probe_process(url: str, until: float, found: Any) -> None:
    seen = overload.Observed()
    asyncio.run(overload.probe(url, until, seen))
    found.put(seen)


async def held(url: str) -> tuple[int, int]:
    """Sequences that ingresses and engines still hold."""
    return await chaos.Load(url).left()


async def ranks_of(url: str) -> set[int]:
    return {pid for pids in await chaos.Load(url).ranks() for pid in pids}


def run_clients(url: str, good: int, seconds: float) -> dict[str, Any]:
    """What the clients found in so many seconds, in which `/health` was asked too."""
    context = multiprocessing.get_context("spawn")
    answers, health = context.Queue(), context.Queue()
    until = time.monotonic() + seconds
    clients = [
        context.Process(target=mixed_process, args=(url, good, until, answers)),
        context.Process(target=probe_process, args=(url, until, health)),
    ]
    for client in clients:
        client.start()
    found: dict[str, Any] = answers.get(timeout=seconds + 600)
    probed: overload.Observed = health.get(timeout=60)
    for client in clients:
        client.join()
    found |= {
        "health_failed": sorted(set(probed.failed)),
        "health_ms": overload.quantiles_ms(probed.health_after),
        "health_asked": len(probed.health_after),
    }
    return found


def soak(url: str, args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The first part. Returns its figures, and what was wrong."""
    run_clients(url, args.clients, _WARM_UP_S)
    settle()
    before = {pid: (name_of(title), open_sockets(pid)) for pid, title in service_processes().items()}
    ranks, memory = asyncio.run(ranks_of(url)), Memory()
    with memory:
        found = run_clients(url, args.clients, 60 * args.minutes)
    sequences = asyncio.run(held(url))
    settle()
    wrong = [*problems(found), *leftovers(before)]
    if sequences != (0, 0):
        wrong.append(f"sequences left in ingresses and engines: {sequences}")
    return {**found, "memory": list(memory.rows(ranks))}, wrong


def settle() -> None:
    """Waits until the service's processes open and close no sockets any more."""
    now = time.monotonic()
    deadline, steady_since, last = now + _SETTLE_S, now, sockets_of_service()
    while now < min(deadline, steady_since + _STEADY_S):
        time.sleep(0.25)
        now, sockets = time.monotonic(), sockets_of_service()
        if sockets != last:
            steady_since, last = now, sockets


def sockets_of_service() -> dict[int, int]:
    return {pid: open_sockets(pid) for pid in service_processes()}


def problems(found: dict[str, Any]) -> Iterator[str]:
    """What clients saw that they should not."""
    for kind in ("sent_again", "lost", "changed", "health_failed"):
        yield from (f"{kind}: {each}" for each in found[kind][:5])
    for kind, outcomes in found["bad_clients"].items():
        if others := {each: count for each, count in outcomes.items() if each not in USUAL.get(kind, ())}:
            yield f"{kind}: {others}"


def leftovers(before: dict[int, tuple[str, int]]) -> Iterator[str]:
    """Processes and sockets that were not there before, by process id with the name and the number of sockets; and
    processes that are gone."""
    after = service_processes()
    for pid, (name, sockets) in before.items():
        if pid not in after:
            yield f"gone: {name}"
        elif (now := open_sockets(pid)) > sockets + _RAYS_OWN:
            yield f"sockets of {name}: {sockets} before, {now} after"
    yield from (f"come: {name_of(title)}" for pid, title in after.items() if pid not in before)


def goodput(url: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The second part: one row for each load."""
    capacity = 2 * RUNNING
    loads = [
        overload.Load(round(capacity * load), args.seconds, args.seconds / 4, OUTPUT_LEN)
        for load in args.loads
    ]
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    process = context.Process(target=overload.client_process, args=(url, loads, found))
    process.start()
    seen = [found.get(timeout=10 * args.seconds + 300) for _ in loads]
    process.join()
    peak = max(max(each.finished for each in seen), 1)
    return [
        {
            "load": multiple,
            "tokens_per_s": round(OUTPUT_LEN * each.finished / (load.seconds / 2)),
            "share_of_peak": round(each.finished / peak, 2),
            "ttft_ms": overload.quantiles_ms(each.first_part_after),
            "refused": len(each.refused_after),
            "share_refused": round(
                len(each.refused_after) / max(len(each.refused_after) + len(each.first_part_after), 1), 2
            ),
            "refused_after_ms": overload.quantiles_ms(each.refused_after),
            "health_ms": overload.quantiles_ms(each.health_after),
            "failed": sorted(set(each.failed))[:5],
        }
        for multiple, load, each in zip(args.loads, loads, seen, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="of mixed load; 0: none")
    parser.add_argument("--clients", type=int, default=8, help="that compare their answers")
    parser.add_argument("--loads", type=float, nargs="+", default=[1, 2, 4, 10], help="multiples of capacity")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each of these loads")
    args = parser.parse_args()
    about = run_info()
    figures: dict[str, Any] = {}
    wrong: list[str] = []
    with running_service(read_service_config(SETTINGS)) as service:
        if args.minutes:
            figures, wrong = soak(service.url, args)
            for name, value in figures.items():
                print(f"{name}: {value}", flush=True)
        figures["goodput"] = goodput(service.url, args)
    for row in figures["goodput"]:
        print(row)
        wrong += [f"{row['load']}x: {each}" for each in row["failed"]]
    processes = list(service_processes().values())
    wrong += [f"processes left at the end: {processes}"] if processes else []
    write("load", about, {"minutes": args.minutes, **figures, "wrong": wrong})
    for line in wrong:
        print(f"WRONG: {line}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
