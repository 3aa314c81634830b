"""Share of the machine's limits that one rank reaches: of memory bandwidth in decode, of matrix products in prefill.

Each limit is measured by the same threads directly before and after a row, and the higher value counts, since other
users of the machine change it from minute to minute.

    python -m benchmarks.shares [--models FOLDER]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare.checkpoints import SHAPES, write_checkpoint
from benchmarks.compare.limits import Machine, product_rate, row_limit
from benchmarks.compare.workload import Row, make_work
from benchmarks.record import keep
from benchmarks.timing import host_seconds
from qwen3_dist import LLM, SamplingParams
from qwen3_dist.config import ModelConfig

ROWS = (Row(1, 32, 64), Row(4, 1024, 1))
TURNS = 8
REPEATS = 3  # of the bandwidth measurement, of which the best counts


def limits(buffer: torch.Tensor) -> Machine:
    """Memory bandwidth, from a buffer larger than all caches, and matrix product rate of this process's threads."""
    return Machine(buffer.nbytes / min(host_seconds(buffer.sum, REPEATS)), product_rate())


def shares(name: str, folder: Path) -> list[dict[str, Any]]:
    config = ModelConfig.from_directory(folder)
    prompts = {row["row"]: row["prompts"] for row in make_work(TURNS, config.vocab_size, 1)["rows"]}
    buffer = torch.ones(1 << 28)
    settings: dict[str, Any] = {"max_model_len": 2048, "prefix_caching": False, "use_tqdm": False}
    found = []
    with LLM(str(folder), layout="tp=1", executor="in_process", **settings) as llm:
        for row in ROWS:
            params = SamplingParams(temperature=0, max_tokens=row.output_len, ignore_eos=True)
            llm.generate(prompts[str(row)][0], params, use_tqdm=False)
            rates, reached = [], []
            before = limits(buffer)
            for turn in prompts[str(row)]:
                started = time.perf_counter()
                llm.generate(turn, params, use_tqdm=False)
                seconds = time.perf_counter() - started
                after = limits(buffer)
                best = Machine(
                    max(before.read_bytes_per_s, after.read_bytes_per_s),
                    max(before.flops_per_s, after.flops_per_s),
                )
                rates.append(row.rate(seconds))
                reached.append(row_limit(config, row, best) / seconds)
                before = after
            found.append(
                {
                    "model": name,
                    "row": str(row),
                    "tokens_per_s": [round(rate, 1) for rate in rates],
                    "shares": [round(share, 3) for share in reached],
                    "median_share": round(statistics.median(reached), 3),
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shares", description=__doc__)
    parser.add_argument(
        "--models", type=Path, default=Path("build/compare"), help="directory of the checkpoints"
    )
    folder = parser.parse_args().models
    rows = [
        row for name, shape in SHAPES.items() for row in shares(name, write_checkpoint(shape, folder / name))
    ]
    keep("shares", rows)


if __name__ == "__main__":
    main()
