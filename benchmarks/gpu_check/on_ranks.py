"""Compares collectives with gloo's, on rank processes of this host with a GPU each, or on CPU ranks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gpu_check.check import CheckFailed, Figures, Setting
from benchmarks.gpu_check.experts import microseconds
from qwen3_dist.launch.processes import Nursery
from qwen3_dist.layout import Layout
from qwen3_dist.parallel.communicator import Communicator, StagedCommunicator, TorchCommunicator
from qwen3_dist.parallel.context import ParallelContext

_COLUMNS = 2048  # of bf16


@dataclass(frozen=True)
class _Rank:
    setting: Setting
    rank: int
    world: int
    port: int
    rows: tuple[int, ...]
    answer: str  # file


def compare_collectives(
    setting: Setting, world: int, rows: tuple[int, ...], timeout_s: float = 60.0
) -> Figures:
    """Microseconds of each collective on rank 0: with NCCL (on CPU, shared memory), and with gloo.

    Tensors are [rows, 2048] in bf16. Raises CheckFailed if results differ on any rank.
    """
    store = dist.TCPStore("127.0.0.1", 0, world, is_master=True, wait_for_workers=False)
    ranks = [
        _Rank(setting, rank, world, store.port, rows, str(setting.folder / f"collectives-{rank}.json"))
        for rank in range(world)
    ]
    nursery = Nursery()
    try:
        pids = nursery.launch(_compare, ranks)
        deadline = time.monotonic() + timeout_s
        while None in (codes := nursery.exit_codes(pids)):
            if time.monotonic() > deadline:
                late = [rank for rank, code in enumerate(codes) if code is None]
                raise CheckFailed(f"ranks {late} still run after {timeout_s:g} s")
            time.sleep(0.05)
    finally:
        nursery.close()
    if any(codes):
        raise CheckFailed(f"ranks ended with codes {codes}; stderr says why")
    answers = [json.loads(Path(rank.answer).read_text()) for rank in ranks]
    differ = sorted({name for answer in answers for name in answer["differ"]})
    if differ:
        raise CheckFailed(f"results differ from gloo's: {', '.join(differ)}", **answers[0]["figures"])
    figures: Figures = answers[0]["figures"]
    return figures


def _compare(this: _Rank) -> None:
    """Main function of a rank: compares all collectives and writes the answer file."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if this.setting.on_gpu:
        device = torch.device("cuda", this.rank)
        torch.cuda.set_device(device)
    store = dist.TCPStore("127.0.0.1", this.port, this.world, is_master=False)
    parallel = ParallelContext.connect(Layout(tp=this.world), this.rank, store, device, timeout_s=30)
    over_host = TorchCommunicator(dist.new_group(list(range(this.world))), torch.device("cpu"))
    gloo: Communicator = StagedCommunicator(over_host, device) if this.setting.on_gpu else over_host
    differ, figures = [], {}
    for rows in this.rows:
        generator = torch.Generator().manual_seed(rows + this.rank)
        # Small integers, whose sums are exact in any order.
        x = torch.randint(-4, 5, (rows, _COLUMNS), generator=generator).to(device, torch.bfloat16)
        for name, call in _calls(this, x).items():
            results = [call(communicator) for communicator in (parallel.tp, gloo)]
            if not _equal(*results):
                differ.append(f"{name} of {rows} rows on rank {this.rank}")
            fast, slow = (microseconds(lambda c=c, f=call: f(c), this.setting) for c in (parallel.tp, gloo))
            figures[f"{name}, {x.nbytes >> 10} KiB"] = {"us": fast, "gloo_us": slow}
    Path(this.answer).write_text(json.dumps({"differ": differ, "figures": figures}))
    dist.barrier(group=over_host._group)
    parallel.close()


def _calls(this: _Rank, x: Tensor) -> dict[str, Callable[[Communicator], Any]]:
    rank, world, rows = this.rank, this.world, len(x)
    sent = [rows // world + (rows % world if to == rank else 0) for to in range(world)]
    return {
        "all_reduce": lambda c: c.all_reduce(x.clone()),
        "all_gather": lambda c: c.all_gather(x),
        "reduce_scatter": lambda c: c.reduce_scatter(x.repeat(world, 1)),
        "gather": lambda c: c.gather(x),
        "broadcast": lambda c: c.broadcast(x.clone()),
        "all_to_all": lambda c: c.all_to_all(x, sent)[0],
    }


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
