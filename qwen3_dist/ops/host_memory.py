"""Allocates large zeroed tensors. On a CPU the kernel provides each page at its first use: zeroing gigabytes ahead of
that would be most of an engine's start time.

Memory that the kernel calls free may therefore be promised to such tensors. Each process publishes the bytes of its
mappings in a memory file, which other processes of the same user find among its open files and which ends with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import re
import sys
import weakref
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

_LARGE = 1 << 20  # bytes from which a tensor gets its own mapping
_LEDGER = "qwen3_dist-mapped-bytes"


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Like `torch.zeros`."""
    size = prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _LARGE or sys.platform != "linux":
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # the kernel has no huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    _ledger.add(size)
    weakref.finalize(memory, _ledger.remove, size, os.getpid()).atexit = False
    return torch.frombuffer(memory, dtype=dtype).view(*shape)  # keeps the mapping


def give_back(tensor: Tensor) -> None:
    """Gives the pages of a CPU tensor's storage back to the kernel. The tensor keeps its address, and loses its
    contents; pages come again, zeroed, when they are used."""
    storage, page = tensor.untyped_storage(), mmap.PAGESIZE
    first = -(-storage.data_ptr() // page) * page
    size = (storage.data_ptr() + storage.nbytes()) // page * page - first
    if size > 0 and sys.platform == "linux":
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def promised_bytes() -> int:
    """Bytes that tensors of `zeros` in all processes of this user may still take from the host."""
    return sum(promised_to(process) for process in Path("/proc").glob("[0-9]*"))


def promised_to(process: Path) -> int:
    """The part of one process, given by its directory in /proc; 0 if it has ended or belongs to another user.

    This is its mapped bytes less all its resident anonymous memory. Other memory of the process counts as a part of
    the mappings that is in use, so the result is too low by at most that: some 100 MiB.
    """
    try:
        mapped = _mapped_bytes(process)
        resident = re.search(r"RssAnon:\s*(\d+) kB", (process / "status").read_text()) if mapped else None
        return max(0, mapped - (int(resident[1]) << 10)) if resident else 0
    except OSError:
        return 0


class _Ledger:
    """Publishes the bytes of this process's mappings."""

    def __init__(self) -> None:
        self._file: int | None = None
        self._bytes = 0

    def add(self, size: int) -> None:
        self._bytes += size
        if self._file is None:
            self._file = os.memfd_create(_LEDGER)
        os.pwrite(self._file, b"%20d" % self._bytes, 0)

    def remove(self, size: int, process: int) -> None:
        """Removes a mapping that `process` made: in a fork the mappings are the parent's."""
        if process == os.getpid():
            self.add(-size)

    def reset(self) -> None:
        """Starts anew in a forked process."""
        if self._file is not None:
            os.close(self._file)
        self._file, self._bytes = None, 0


_ledger = _Ledger()
os.register_at_fork(after_in_child=_ledger.reset)


def _mapped_bytes(process: Path) -> int:
    for file in (process / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if os.readlink(file).startswith(f"/memfd:{_LEDGER}"):
                return int(file.read_text() or 0)
    return 0
