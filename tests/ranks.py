"""Runs a function on real ranks: one process each, joined through a rendezvous store.

Every rank of `run_ranks(check, "tp=2")` calls `check(parallel)`, a module-level function, with its
`ParallelContext`; an exception on any rank fails the caller, with that rank's traceback.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import inspect
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qwen3_dist.launch.processes import Nursery
from qwen3_dist.layout import Layout
from qwen3_dist.parallel.context import ParallelContext

ROOT = Path(__file__).parent.parent
HANG_S = 240.0  # ends ranks that hang before pytest ends the run; slow ranks on a busy machine need less


class _ByName:
    """A function on its way to other processes, which know its module by its place below the repository."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._place = (
            Path(inspect.getfile(function)).relative_to(ROOT).with_suffix("").parts,
            function.__name__,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _find, self._place


def by_name(function: Callable[..., None]) -> Any:
    """A module's function, to be pickled to ranks."""
    return _ByName(function)


def _find(module: tuple[str, ...], name: str) -> Any:
    return getattr(importlib.import_module(".".join(module)), name)


@dataclass(frozen=True)
class _Rank:
    check: Any  # a `_ByName` before it is pickled, the check itself after
    layout: str
    rank: int
    shared_memory: bool
    staged: bool
    port: int
    printed: str  # file of its standard output
    complaints: str  # and of its standard error


@functools.cache
def kept_nursery() -> Nursery:
    """The process that forks ranks for all tests: it imports torch once, for seconds of CPU time."""
    return Nursery()


@atexit.register
def end_nursery() -> None:
    """Ends the process that forks ranks; the next test that needs one makes another."""
    if kept_nursery.cache_info().currsize:
        kept_nursery().close()
        kept_nursery.cache_clear()


def run_ranks(
    check: Callable[[ParallelContext], None],
    layout: str,
    shared_memory: bool = True,
    staged: bool = False,
    dies: int | None = None,
    timeout_s: float = HANG_S,
) -> list[str]:
    """Runs `check` on every rank of `layout`; returns what each printed. Rank `dies` is expected to."""
    world = Layout.parse(layout).world
    store = dist.TCPStore("127.0.0.1", 0, world, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            _Rank(
                _ByName(check),
                layout,
                rank,
                shared_memory,
                staged,
                store.port,
                f"{folder}/{rank}.out",
                f"{folder}/{rank}.err",
            )
            for rank in range(world)
        ]
        pids = kept_nursery().launch(_main, ranks)
        try:
            deadline = time.monotonic() + timeout_s
            while None in (codes := kept_nursery().exit_codes(pids)):
                assert time.monotonic() < deadline, f"ranks still run after {timeout_s:g} s: {codes}"
                time.sleep(0.02)
        finally:
            kept_nursery().end(pids)
        failures = [
            Path(rank.complaints).read_text() or f"rank {rank.rank} ended with code {code}"
            for rank, code in zip(ranks, codes, strict=True)
            if code and rank.rank != dies
        ]
        assert not failures, "\n".join(failures)
        return [Path(rank.printed).read_text() for rank in ranks]


def _main(this: _Rank) -> None:
    for name, descriptor in ((this.printed, 1), (this.complaints, 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), descriptor)
    torch.set_num_threads(1)
    layout = Layout.parse(this.layout)
    store = dist.TCPStore("127.0.0.1", this.port, layout.world, is_master=False)
    parallel = ParallelContext.connect(
        layout,
        this.rank,
        store,
        torch.device("cpu"),
        timeout_s=HANG_S,
        shared_memory=this.shared_memory,
        staged=this.staged,
    )
    this.check(parallel)
    parallel.close()
