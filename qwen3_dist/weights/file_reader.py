"""Reads regions of tensors from safetensors files, straight to where they stay if they lie there as in the file.

A file is read, not mapped: each page of a mapping costs a fault, and counts as memory of the process.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from qwen3_dist.errors import CheckpointError
from qwen3_dist.weights.parts import Entry

_CHUNK_BYTES = 8 << 20
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


class FileReader:
    """Reads with one file open at a time. For one thread."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._descriptor = -1
        self._buffer: Tensor | None = None

    def close(self) -> None:
        if self._file is not None:
            os.close(self._descriptor)
            self._file = None

    __del__ = close

    def read(
        self,
        stored: Entry,
        dtype: torch.dtype,
        ranges: Sequence[range],
        out: Tensor,
        progress: Callable[[int], object] = lambda elements: None,
    ) -> None:
        """Fills `out`, of any device and dtype, with the region of a tensor of `dtype` that has these indices along
        each dimension. `progress` is called with numbers of elements. Raises CheckpointError, naming the file."""
        if not stored.shape:
            stored, ranges, out = stored._replace(shape=(1,)), [range(1)], out.view(1)
        for span in _spans(stored, dtype.itemsize, ranges):
            place = out[span.place]
            self._fill(stored.file, dtype, span, place)
            progress(place.numel())

    def _fill(self, file: Path, dtype: torch.dtype, span: _Span, place: Tensor) -> None:
        size = span.count * prod(span.inner) * dtype.itemsize
        is_plain = place.numel() == span.count * prod(span.inner) and place.is_contiguous()
        if is_plain and place.dtype == dtype and place.device.type == "cpu":
            self._read_bytes(file, span.start, place.data_ptr(), size)
            return
        buffer = self._buffer_of(size, place.device.type == "cuda")
        self._read_bytes(file, span.start, buffer.data_ptr(), size)
        rows = buffer[:size].view(dtype).view(span.count, *span.inner)
        _copy(place, rows[(slice(None), *span.cut)])

    def _buffer_of(self, size: int, pinned: bool) -> Tensor:
        if self._buffer is None or len(self._buffer) < size or (pinned and not self._buffer.is_pinned()):
            self._buffer = torch.empty(max(size, _CHUNK_BYTES), dtype=torch.uint8, pin_memory=pinned)
        return self._buffer

    def _read_bytes(self, file: Path, start: int, address: int, size: int) -> None:
        try:
            if file != self._file:
                self.close()
                self._descriptor = os.open(file, os.O_RDONLY)
                self._file = file
            memory = memoryview((ctypes.c_char * size).from_address(address)).cast("B")
            done = 0
            while done < size:
                count = os.preadv(self._descriptor, [memory[done:]], start + done)
                if not count:
                    raise OSError("it has become shorter")
                done += count
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({error}); fetch it again") from None


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
