"""Zeroed memory for large tensors. On a CPU the kernel gives pages when they are first used: zeroing gigabytes ahead
of that is most of what starting an engine would take, and in the background it holds up the first steps as long."""

from __future__ import annotations

import contextlib
import mmap
import sys
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

_LARGE = 1 << 20  # bytes from which a tensor has a mapping of its own


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `torch.zeros`."""
    size = prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _LARGE or sys.platform != "linux":
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # of a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)  # keeps the mapping
