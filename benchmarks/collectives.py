"""Small all-reduce and all-to-all between two one-thread CPU ranks: shared memory against gloo, in one run.

python -m benchmarks.collectives
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.record import keep, microseconds
from qwen3_dist.parallel.communicator import Communicator, TorchCommunicator
from qwen3_dist.parallel.shared_memory import connect_shared_memory

WORLD = 2
SIZES = (2 << 10, 64 << 10, 2 << 20)


def _rank(rank: int, rendezvous: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(rendezvous, WORLD), rank=rank, world_size=WORLD)
    group = dist.new_group(list(range(WORLD)))
    shared = connect_shared_memory(group)
    assert shared is not None, "this machine's ranks cannot share memory"
    gloo = TorchCommunicator(group, torch.device("cpu"))
    for size in SIZES:
        x = torch.ones(size // 2 // 1024, 1024, dtype=torch.bfloat16)
        counts = [len(x) // 2, len(x) - len(x) // 2]
        received = [counts[rank]] * WORLD
        for name in ("all_reduce", "all_to_all"):
            row: dict[str, Any] = {"collective": name, "bytes": size}
            pairs: tuple[tuple[str, Communicator, int], ...] = (("shared", shared, 400), ("gloo", gloo, 60))
            for label, communicator, repeats in pairs:
                if name == "all_reduce":
                    took = microseconds(lambda c=communicator, x=x: c.all_reduce(x), repeats)
                else:
                    took = microseconds(
                        lambda c=communicator, x=x, s=counts, r=received: c.all_to_all(x, s, r), repeats
                    )
                row[f"{label}_p50_us"], row[f"{label}_p99_us"] = took["p50_us"], took["p99_us"]
            row["gloo_over_shared"] = round(row["gloo_p50_us"] / row["shared_p50_us"], 1)
            if rank == 0:
                results.put(row)
    shared.close()
    dist.destroy_process_group()


def main() -> None:
    results = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (str(Path(folder) / "store"), results), WORLD)
    keep("collectives-cpu", [results.get() for _ in range(2 * len(SIZES))])


if __name__ == "__main__":
    main()
