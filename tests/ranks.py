"""Runs a function on real ranks: one fresh process each, joined through a rendezvous store.

Every rank of `run_ranks(check, "tp=2")` calls `check(parallel)`, a module-level function, with its
`ParallelContext`; an exception on any rank fails the caller, with that rank's traceback.
"""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from qwen3_dist.layout import Layout
from qwen3_dist.parallel.context import ParallelContext

ROOT = Path(__file__).parent.parent


def run_ranks(
    check: Callable[[ParallelContext], None],
    layout: str,
    shared_memory: bool = True,
    staged: bool = False,
    dies: int | None = None,
    timeout_s: float = 120.0,
) -> list[str]:
    """Runs `check` on every rank of `layout`; returns what each printed. Rank `dies` is expected to."""
    module = ".".join(Path(inspect.getfile(check)).relative_to(ROOT).with_suffix("").parts)
    target = f"{module}:{check.__name__}"
    world = Layout.parse(layout).world
    store = dist.TCPStore("127.0.0.1", 0, world, is_master=True, wait_for_workers=False)
    command = [
        sys.executable,
        "-m",
        "tests.ranks",
        target,
        layout,
        str(shared_memory),
        str(staged),
        str(store.port),
    ]
    ranks = [
        subprocess.Popen(
            [*command, str(rank)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]
    try:
        answers = [rank.communicate(timeout=timeout_s) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    failures = [answers[rank][1] for rank in range(world) if ranks[rank].returncode and rank != dies]
    assert not failures, "\n".join(failures)
    return [printed for printed, _ in answers]


def _main(target: str, layout: str, shared_memory: str, staged: str, port: str, rank: str) -> None:
    torch.set_num_threads(1)
    parsed = Layout.parse(layout)
    store = dist.TCPStore("127.0.0.1", int(port), parsed.world, is_master=False)
    parallel = ParallelContext.connect(
        parsed,
        int(rank),
        store,
        torch.device("cpu"),
        timeout_s=60,
        shared_memory=shared_memory == "True",
        staged=staged == "True",
    )
    module, function = target.split(":")
    getattr(importlib.import_module(module), function)(parallel)
    parallel.close()


if __name__ == "__main__":
    _main(*sys.argv[1:])
