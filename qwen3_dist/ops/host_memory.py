"""Zeroed memory for large tensors. On a CPU the kernel gives pages when they are first used: zeroing gigabytes ahead
of that is most of what starting an engine would take, and in the background it holds up the first steps as long.

What the kernel calls free is then partly promised. So each process lists its mappings in a ledger: a file in its
memory, which others of the same user find among its open files and which ends with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from math import prod
from pathlib import Path

import torch
from torch import Tensor

_LARGE = 1 << 20  # bytes from which a tensor has a mapping of its own
_LEDGER = "qwen3_dist-mappings"
_Range = tuple[int, int]  # addresses, the second one not in it


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `torch.zeros`."""
    size = prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _LARGE or sys.platform != "linux":
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # of a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    _ledger.add(memory)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)  # keeps the mapping


def promised_bytes() -> int:
    """Bytes that `zeros` of this user's processes, this one too, may yet take from the host."""
    return sum(promised_to(process) for process in Path("/proc").glob("[0-9]*"))


def promised_to(process: Path) -> int:
    """The part of a process, by its folder in /proc; 0 if it ends meanwhile or is another user's."""
    try:
        listed = [_range(line) for line in _ledger_of(process)]
        return sum(_untouched_parts(process, listed)) if listed else 0
    except OSError:
        return 0


class _Ledger:
    """This process's mappings."""

    def __init__(self) -> None:
        self._file: int | None = None
        self._ranges: dict[int, int] = {}

    def add(self, memory: mmap.mmap) -> None:
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._ranges[start] = start + len(memory)
        weakref.finalize(memory, self._remove, start, os.getpid()).atexit = False
        self._write()

    def _remove(self, start: int, process: int) -> None:
        if process == os.getpid():
            del self._ranges[start]
            self._write()

    def _write(self) -> None:
        if self._file is None:
            self._file = os.memfd_create(_LEDGER)
        text = "".join(f"{start:x}-{end:x}\n" for start, end in list(self._ranges.items())).encode()
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, text, 0)

    def forget(self) -> None:
        """In a fork, where mappings are the parent's."""
        if self._file is not None:
            os.close(self._file)
        self._file = None
        self._ranges = {}


_ledger = _Ledger()
os.register_at_fork(after_in_child=_ledger.forget)


def _ledger_of(process: Path) -> Iterator[str]:
    for file in (process / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if os.readlink(file).startswith(f"/memfd:{_LEDGER}"):
                yield from file.read_text().splitlines()


def _untouched_parts(process: Path, listed: Iterable[_Range]) -> Iterator[int]:
    """Of each of the kernel's mappings, which may join several of ours and others."""
    lines = (process / "smaps").read_text().splitlines()
    heads = [number for number, line in enumerate(lines) if "-" in line.split(" ", 1)[0]]
    for head, end in pairwise([*heads, len(lines)]):
        first, last = _range(lines[head].split(" ", 1)[0])
        ours = sum(max(0, min(last, b) - max(first, a)) for a, b in listed)
        if ours:
            resident = next(int(line.split()[1]) << 10 for line in lines[head:end] if line.startswith("Rss:"))
            yield min(ours, last - first - resident)


def _range(text: str) -> _Range:
    start, end = text.split("-")
    return int(start, 16), int(end, 16)
