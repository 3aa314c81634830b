"""Memory whose pages come when they are used."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

from qwen3_dist import host_memory

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


def test_pages_come_with_use_and_go_with_the_tensor() -> None:
    before = resident()
    x = host_memory.zeros((256 * MIB,), torch.uint8, CPU)
    assert resident() - before < 64 * MIB
    x.fill_(1)
    assert resident() - before > 200 * MIB
    del x
    gc.collect()
    assert resident() - before < 64 * MIB
