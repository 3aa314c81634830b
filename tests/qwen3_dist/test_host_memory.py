"""Zeroed tensors whose pages are allocated at first use, and the host memory that they may still take."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwen3_dist.ops import host_memory
from qwen3_dist.worker import kv_cache

CPU = torch.device("cpu")
MIB = 1 << 20


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("shape", [(3, 5), (33, 1024, 1024)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_zeros_are_zeros_and_can_be_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = host_memory.zeros(shape, dtype, CPU)
    assert x.shape == shape and x.dtype == dtype and x.is_contiguous() and not x.any()
    x[-1] = 1
    assert x[-1].all() and not x[:-1].any()


def test_pages_are_allocated_at_first_use_and_freed_with_the_tensor() -> None:
    before = resident()
    x = host_memory.zeros((256 * MIB,), torch.uint8, CPU)
    assert resident() - before < 64 * MIB
    x.fill_(1)
    assert resident() - before > 200 * MIB
    del x
    gc.collect()
    assert resident() - before < 64 * MIB


def promised_to(process: int) -> int:
    return host_memory.promised_to(Path(f"/proc/{process}"))


def test_untouched_memory_is_promised() -> None:
    gc.collect()
    ballast = host_memory.zeros((4096 * MIB,), torch.uint8, CPU)  # more than this process has resident
    before = promised_to(os.getpid())
    assert 1024 * MIB < before < ballast.nbytes
    x = host_memory.zeros((256 * MIB,), torch.uint8, CPU)
    assert promised_to(os.getpid()) - before == pytest.approx(256 * MIB, abs=16 * MIB)
    assert host_memory.promised_bytes() >= before
    x[: 128 * MIB] = 1
    assert promised_to(os.getpid()) - before == pytest.approx(128 * MIB, abs=16 * MIB)
    del x
    gc.collect()
    assert promised_to(os.getpid()) == pytest.approx(before, abs=16 * MIB)


def test_a_cache_leaves_promised_memory_free() -> None:
    free = kv_cache.free_bytes(CPU, 0.9, 1)
    x = host_memory.zeros((4096 * MIB,), torch.uint8, CPU)
    assert free - kv_cache.free_bytes(CPU, 0.9, 1) > 0.1 * x.nbytes  # 0.3, less this process's own memory


OTHER_PROCESS = """
import os, sys, torch
from qwen3_dist.ops import host_memory
x = host_memory.zeros((2048 << 20,), torch.uint8, torch.device("cpu"))
x[: 64 << 20] = 1
if not os.fork():
    print(os.getpid(), flush=True)  # the fork has reset its ledger
sys.stdin.read()
"""


def test_memory_of_another_process_is_promised_once_and_until_it_ends() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdin is not None
        forked = int(other.stdout.readline())
        assert 1024 * MIB < promised_to(other.pid) <= 1984 * MIB  # less what Python and torch have resident
        assert promised_to(forked) == 0
        other.stdin.close()
    assert promised_to(other.pid) == 0
