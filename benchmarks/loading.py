"""Loads a checkpoint with one rank, from the disk and from the page cache, against plain reads of its files.

    python -m benchmarks.loading [--model DIR] [--times 3]

The model is by default the MoE of `benchmarks.compare` with random weights. Each time the files are dropped from the
page cache and read once by 16 threads, dropped and loaded, and loaded once more. Each load is a process of its own.
The best of all times counts. Memory is the process's peak, without what it has before it loads, over the bytes of the
weights.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.compare.checkpoints import SHAPES, write_checkpoint
from benchmarks.record import run_info, write

_PART = 8 << 20
_THREADS = 16


def drop(files: list[Path]) -> None:
    """Takes the files out of the page cache."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(files: list[Path]) -> float:
    """Seconds to read the files by several threads."""
    parts = [(file, start) for file in files for start in range(0, file.stat().st_size, _PART)]

    def run(some: list[tuple[Path, int]]) -> None:
        memory = bytearray(_PART)
        for file, start in some:
            with file.open("rb", buffering=0) as opened:
                os.preadv(opened.fileno(), [memory], start)

    share = -(-len(parts) // _THREADS)
    began = time.perf_counter()
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(run, [parts[at : at + share] for at in range(0, len(parts), share)]))
    return time.perf_counter() - began


def load_here(path: Path) -> None:
    """Loads the model in this process. Prints what `load` returns."""
    import torch

    from qwen3_dist.config import ModelConfig
    from qwen3_dist.parallel.context import ParallelContext
    from qwen3_dist.weights.loader import load_model

    config, parallel = ModelConfig.from_directory(path), ParallelContext.single()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    model = load_model(path, config, parallel, torch.bfloat16, torch.device("cpu"))
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    size = sum(each.nbytes for each in {each.data_ptr(): each for each in model.parameters()}.values())
    print(json.dumps({"seconds": seconds, "bytes": size, "peak_bytes": 1024 * peak}))


def load(path: Path) -> dict[str, Any]:
    """Seconds of a load, bytes of the weights, and bytes of the peak of memory."""
    command = [sys.executable, "-m", "benchmarks.loading", "--here", "--model", str(path)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="directory of a checkpoint")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        load_here(args.model)
        return
    about = run_info()
    path = args.model or write_checkpoint(SHAPES["moe"], Path("build/compare/moe"))
    files = sorted(path.glob("*.safetensors"))
    reads, cold, warm = [], [], []
    for _ in range(args.times):
        drop(files)
        reads.append(read(files))
        drop(files)
        cold.append(load(path))
        warm.append(load(path))
    size = sum(file.stat().st_size for file in files)
    rates = {
        "disk": size / min(reads),
        "load from disk": size / min(each["seconds"] for each in cold),
        "load from page cache": size / min(each["seconds"] for each in warm),
    }
    for name, rate in rates.items():
        print(f"{name}: {rate / 1e9:.2f} GB/s, {rate / rates['disk']:.0%} of the disk's rate")
    memory = max(each["peak_bytes"] / each["bytes"] for each in cold + warm)
    print(f"peak memory: {memory:.2f} times the weights")
    runs = {"reads_s": reads, "cold": cold, "warm": warm}
    write("loading", about, {"bytes": size, "rates": rates, "peak_over_weights": memory, **runs})


if __name__ == "__main__":
    main()
