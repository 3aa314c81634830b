"""Reads regions of tensors from safetensors files, straight to where they stay if they lie there as in the file.

A file is read, not mapped: each page of a mapping costs a fault, and counts as memory of the process. The kernel is
told what will be read next, since its own read-ahead is too short to keep a fast disk busy.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from qwen3_dist.errors import CheckpointError
from qwen3_dist.weights.parts import Entry

_CHUNK_BYTES = 8 << 20
AHEAD_BYTES = 16 << 20  # that the kernel is told of before they are read
_ADVICE_BYTES = (
    128 << 10
)  # Linux reads no more for one advice than its read-ahead or the disk's largest request
_MOST_OPEN = 8  # files, of which small ones may lie ahead in hundreds
_MIN_BYTES = 64 << 10  # parts of a row that are shorter are read with what lies between them
_SERIAL = (
    1 << 15
)  # elements from which torch copies with several threads, which would fight with other readers'


@dataclass(frozen=True)
class _Span:
    """`count` rows of bytes from `start` on; of each row, which has the shape `inner`, the part `cut`. They belong at
    `place`."""

    start: int
    count: int
    inner: tuple[int, ...]
    cut: tuple[slice, ...]
    place: tuple[int | slice, ...]


@dataclass(frozen=True)
class Read:
    """One read of a file, whose numbers of type `dtype` go to `place`. `progress` is called with their number."""

    file: Path
    dtype: torch.dtype
    span: _Span
    place: Tensor
    progress: Callable[[int], object]

    @property
    def num_bytes(self) -> int:
        return self.span.count * prod(self.span.inner) * self.dtype.itemsize


def reads_of(
    stored: Entry,
    dtype: torch.dtype,
    ranges: Sequence[range],
    out: Tensor,
    progress: Callable[[int], object] = lambda elements: None,
) -> Iterator[Read]:
    """The reads, in the order of the file, that fill `out`, of any device and dtype, with the region of a tensor of
    `dtype` that has these indices along each dimension."""
    if not stored.shape:
        stored, ranges, out = stored._replace(shape=(1,)), [range(1)], out.view(1)
    for span in _spans(stored, dtype.itemsize, ranges):
        yield Read(stored.file, dtype, span, out[span.place], progress)


class FileReader:
    """Keeps the last file open, and the next ones that it has announced. For one thread."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._last: Path | None = None  # that was read
        self._buffer: Tensor | None = None

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    __del__ = close

    def run(self, reads: Iterable[Read]) -> None:
        """Does all `reads` in their order. Raises CheckpointError, naming the file."""
        announced: deque[Read] = deque()
        num_bytes = 0
        for read in reads:
            self._announce(read)
            announced.append(read)
            num_bytes += read.num_bytes
            while num_bytes > AHEAD_BYTES or (announced and len(self._open) > _MOST_OPEN):
                num_bytes -= announced[0].num_bytes
                self._fill(announced.popleft())
        for read in announced:
            self._fill(read)

    def _announce(self, read: Read) -> None:
        """Has the kernel begin to read, where it can be told. What goes wrong, the read itself will tell."""
        if not hasattr(os, "posix_fadvise"):
            return
        start, end = read.span.start, read.span.start + read.num_bytes
        with suppress(OSError):
            descriptor = self._descriptor(read.file)
            for at in range(start, end, _ADVICE_BYTES):
                os.posix_fadvise(descriptor, at, min(_ADVICE_BYTES, end - at), os.POSIX_FADV_WILLNEED)

    def _fill(self, read: Read) -> None:
        place, span, size = read.place, read.span, read.num_bytes
        is_plain = place.dtype == read.dtype and place.nbytes == size and place.is_contiguous()
        if is_plain and place.device.type == "cpu":
            self._read_bytes(read.file, span.start, place.data_ptr(), size)
        else:
            buffer = self._buffer_of(size, place.device.type == "cuda")
            self._read_bytes(read.file, span.start, buffer.data_ptr(), size)
            rows = buffer[:size].view(read.dtype).view(span.count, *span.inner)
            _copy(place, rows[(slice(None), *span.cut)])
        read.progress(place.numel())

    def _buffer_of(self, size: int, pinned: bool) -> Tensor:
        if self._buffer is None or len(self._buffer) < size or (pinned and not self._buffer.is_pinned()):
            self._buffer = torch.empty(max(size, _CHUNK_BYTES), dtype=torch.uint8, pin_memory=pinned)
        return self._buffer

    def _read_bytes(self, file: Path, start: int, address: int, size: int) -> None:
        try:
            descriptor = self._descriptor(file)
            if self._last != file and self._last in self._open:
                os.close(self._open.pop(self._last))
            self._last = file
            memory = memoryview((ctypes.c_char * size).from_address(address)).cast("B")
            done = 0
            while done < size:
                count = os.preadv(descriptor, [memory[done:]], start + done)
                if not count:
                    raise OSError("it has become shorter")
                done += count
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({error}); fetch it again") from None

    def _descriptor(self, file: Path) -> int:
        if file not in self._open:
            self._open[file] = os.open(file, os.O_RDONLY)
        return self._open[file]


def _spans(stored: Entry, item: int, ranges: Sequence[range]) -> Iterator[_Span]:
    """What to read for a region, in the order of the file."""
    shape = stored.shape
    cut_dims = [d for d, part in enumerate(ranges) if len(part) < shape[d]]
    dim = max(cut_dims, default=0)
    while dim and len(ranges[dim]) * prod(shape[dim + 1 :]) * item < _MIN_BYTES:
        dim -= 1
    inner = shape[dim + 1 :]
    row_bytes = prod(inner) * item
    step = max(1, _CHUNK_BYTES // max(1, row_bytes))
    cut = tuple(slice(part.start, part.stop) for part in ranges[dim + 1 :])
    for outer in product(*(list(enumerate(part)) for part in ranges[:dim])):
        first = 0
        for size, (_, at) in zip(shape, outer, strict=False):
            first = first * size + at
        rows = ranges[dim]
        for begin in range(0, len(rows), step):
            part = rows[begin : begin + step]
            start = stored.start + (first * shape[dim] + part.start) * row_bytes
            place: tuple[int | slice, ...] = (*(at for at, _ in outer), slice(begin, begin + len(part)))
            yield _Span(start, len(part), inner, cut, place)


def _copy(out: Tensor, rows: Tensor) -> None:
    """Copies with this thread alone."""
    if out.device.type != "cpu":
        out.copy_(rows)
        return
    step = max(1, (_SERIAL - 1) // max(1, rows[0].numel()))
    for to, some in zip(out.split(step), rows.split(step), strict=True):
        to.copy_(some)
