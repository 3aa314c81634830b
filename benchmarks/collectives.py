"""Collectives between two CPU ranks: shared memory in C++, shared memory in Python, and gloo.

python -m benchmarks.collectives
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.record import keep, microseconds
from qwen3_dist.parallel.communicator import Communicator, TorchCommunicator
from qwen3_dist.parallel.native_shared_memory import NativeSharedMemoryCommunicator
from qwen3_dist.parallel.shared_memory import SharedMemoryCommunicator, connect_shared_memory

WORLD = 2
SIZES = (2 << 10, 64 << 10, 2 << 20)


def _rank(rank: int, rendezvous: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(rendezvous, WORLD), rank=rank, world_size=WORLD)
    group = dist.new_group(list(range(WORLD)))
    native = connect_shared_memory(group, NativeSharedMemoryCommunicator)
    python = connect_shared_memory(group, SharedMemoryCommunicator)
    assert native is not None and python is not None, "this machine's ranks cannot share memory"
    gloo = TorchCommunicator(group, torch.device("cpu"))
    communicators: tuple[tuple[str, Communicator, int], ...] = (
        ("native", native, 400),
        ("python", python, 400),
        ("gloo", gloo, 60),
    )
    for size in SIZES:
        x = torch.ones(size // 2 // 1024, 1024, dtype=torch.bfloat16)
        counts = [len(x) // 2, len(x) - len(x) // 2]
        received = [counts[rank]] * WORLD
        calls: dict[str, Callable[[Communicator], object]] = {
            "all_reduce": lambda c, x=x: c.all_reduce(x),
            "add_all_reduced": lambda c, x=x: c.add_all_reduced(x, x.clone()),
            "gather": lambda c, x=x: c.gather(x),
            "all_to_all": lambda c, x=x, sent=counts, got=received: c.all_to_all(x, sent, got),
        }
        for name, call in calls.items():
            row: dict[str, Any] = {"collective": name, "bytes": size}
            for label, communicator, repeats in communicators:
                took = microseconds(lambda call=call, c=communicator: call(c), repeats)
                row[f"{label}_p50_us"], row[f"{label}_p99_us"] = took["p50_us"], took["p99_us"]
            row["python_over_native"] = round(row["python_p50_us"] / row["native_p50_us"], 1)
            row["gloo_over_native"] = round(row["gloo_p50_us"] / row["native_p50_us"], 1)
            if rank == 0:
                results.put(row)
    native.close()
    python.close()
    dist.destroy_process_group()


def main() -> None:
    results = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (str(Path(folder) / "store"), results), WORLD)
    keep("collectives", [results.get() for _ in range(4 * len(SIZES))])


if __name__ == "__main__":
    main()
