"""MoE FFN of a transformer block with all-to-all, all-gather and plain tp, for 1 to 4096 tokens.

    python -m benchmarks.dispatch [--worlds 2 4]

Ranks are CPU processes with one thread. All layouts process the same number of tokens. Bytes are those that a rank
sends to others with ring collectives and a direct all-to-all.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks.compare.checkpoints import SHAPES
from benchmarks.record import keep
from qwen3_dist.config import ModelConfig
from qwen3_dist.expert_placement import ExpertPlacement
from qwen3_dist.layout import Layout, even_ranges
from qwen3_dist.model.block import TransformerBlock
from qwen3_dist.model.finalize import finalize_blocks
from qwen3_dist.ops.choose import choose_ops
from qwen3_dist.parallel.communicator import Communicator
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.protocol.step_plan import StepPlan
from qwen3_dist.worker.inputs import StepInputs

TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 4096)


class CountingCommunicator(Communicator):
    """Wraps a communicator and counts the bytes that this rank sends through it."""

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner.rank, inner.size)
        self._inner = inner
        self.sent = 0.0

    def all_reduce(self, x: Tensor) -> Tensor:
        self.sent += 2 * x.nbytes * (self.size - 1) / self.size
        return self._inner.all_reduce(x)

    def add_all_reduced(self, x: Tensor, partial: Tensor) -> Tensor:
        self.sent += 2 * x.nbytes * (self.size - 1) / self.size
        return self._inner.add_all_reduced(x, partial)

    def all_gather(self, x: Tensor) -> Tensor:
        self.sent += x.nbytes * (self.size - 1)
        return self._inner.all_gather(x)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        self.sent += x.nbytes * (self.size - 1) / self.size
        return self._inner.reduce_scatter(x)

    def gather(self, x: Tensor) -> Tensor | None:
        self.sent += x.nbytes if self.rank else 0
        return self._inner.gather(x)

    def broadcast(self, x: Tensor) -> Tensor:
        self.sent += 0 if self.rank else x.nbytes * (self.size - 1)
        return self._inner.broadcast(x)

    def all_to_all(
        self, x: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int] | None = None
    ) -> tuple[Tensor, list[int]]:
        self.sent += x[0].nbytes * (sum(send_counts) - send_counts[self.rank]) if len(x) else 0
        return self._inner.all_to_all(x, send_counts, recv_counts)

    def barrier(self) -> None:
        self._inner.barrier()

    def close(self) -> None:
        self._inner.close()


def _rank(rank: int, text: str, rendezvous: str, results: Any) -> None:
    torch.set_num_threads(1)
    layout = Layout.parse(text)
    store = dist.FileStore(rendezvous, layout.world)
    plain = ParallelContext.connect(layout, rank, store, torch.device("cpu"))
    counting: dict[str, Any] = {
        name: CountingCommunicator(getattr(plain, name)) for name in ("tp", "dp", "ep", "etp")
    }
    parallel = replace(plain, **counting)
    config = ModelConfig.from_dict(SHAPES["moe"])
    torch.manual_seed(0)
    placement = ExpertPlacement.even(config.num_experts, layout.ep)
    ops = choose_ops(torch.device("cpu"), torch.bfloat16)
    block = TransformerBlock(config, 0, parallel, placement, ops).to(torch.bfloat16).requires_grad_(False)
    for parameter in block.parameters():
        parameter.normal_(0, 0.02)
    finalize_blocks([block], ops)
    for tokens in TOKENS:
        groups = tuple(len(part) for part in even_ranges(tokens, layout.dp))
        x = torch.randn(groups[parallel.coords.group], config.emb_dim, dtype=torch.bfloat16)
        empty = StepInputs(1, 1, 16, x.device).batch(StepPlan(1, (), groups, False))
        for dispatcher in ("all_gather", "all_to_all") if layout.ep > 1 else ("all_gather",):
            batch = replace(empty, token_ids=torch.empty(len(x)), all_to_all=dispatcher == "all_to_all")

            def run(x: Tensor = x, batch: Any = batch) -> None:
                block.feed_forward(x, x.clone(), batch)

            for each in counting.values():
                each.sent = 0.0
            run()
            sent = sum(each.sent for each in counting.values())
            seconds = _seconds(run)
            if rank == 0:
                name = f"{text}, {dispatcher}" if layout.ep > 1 else text
                results.put((layout.world, tokens, name, tokens / seconds, sent))
    plain.close()


def _seconds(run: Callable[[], None]) -> float:
    """Seconds of the fastest of several runs, with a barrier before each."""
    samples = []
    for _ in range(7):
        dist.barrier()
        started = time.perf_counter()
        run()
        samples.append(time.perf_counter() - started)
    return min(samples)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worlds", nargs="*", type=int, default=[2, 4], help="numbers of ranks")
    options = parser.parse_args()
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for world in options.worlds:
        for layout in (f"tp={world}", f"tp={world},ep={world}", f"dp={world},ep={world}"):
            results = mp.get_context("spawn").SimpleQueue()
            with tempfile.TemporaryDirectory() as folder:
                mp.spawn(_rank, (layout, str(Path(folder) / "store"), results), world)
            while not results.empty():
                ranks, tokens, name, rate, sent = results.get()
                row = rows.setdefault((ranks, tokens), {"ranks": ranks, "tokens": tokens})
                column = name.replace(str(world), "n")
                row[f"{column}: tokens/s"], row[f"{column}: KiB"] = round(rate), round(sent / 1024, 1)
    keep("dispatch", list(rows.values()))


if __name__ == "__main__":
    main()
