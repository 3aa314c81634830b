"""Zeroed memory for large tensors. On a CPU the kernel gives pages when they are first used, since zeroing gigabytes
ahead of that is most of what starting an engine would take."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
import threading
import weakref
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

_LARGE = 1 << 20  # bytes from which a tensor has a mapping of its own
_CHUNK = 1 << 25
_POPULATE_WRITE = 23  # of madvise, since Linux 5.14


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.zeros`."""
    size = prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _LARGE or sys.platform != "linux":
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # of a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)  # keeps the mapping


def populate(tensors: Sequence[Tensor]) -> None:
    """Has the kernel give `zeros` their pages in the background, the first of each first: others that ask how much
    memory is left should see them taken. Stops when one of them is freed; does nothing where the kernel cannot."""
    mapped = [t for t in tensors if t.device.type == "cpu" and t.nbytes >= _LARGE]
    if mapped and sys.platform == "linux":
        weak = [weakref.ref(tensor) for tensor in mapped]
        threading.Thread(target=_populate, args=(weak,), name="populate", daemon=True).start()


def _populate(tensors: Sequence[weakref.ref[Tensor]]) -> None:
    madvise = ctypes.CDLL(None).madvise
    start, last = 0, False
    while not last:
        last = True
        for weak in tensors:
            tensor = weak()
            if tensor is None:
                return
            size = min(_CHUNK, tensor.nbytes - start)
            if size > 0:
                last = False
                at = ctypes.c_void_p(tensor.data_ptr() + start)
                if madvise(at, ctypes.c_size_t(size), _POPULATE_WRITE):
                    return
            del tensor
        start += _CHUNK
