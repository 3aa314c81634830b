"""The collectives of `shared_memory.py` in C++ (`ops/cpu/collectives.h`), with the same segment and protocol.

In Python, most of the time of a small all-reduce is spent on a dozen Python calls.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

import torch
from torch import Tensor

from qwen3_dist.ops.cpu import structs
from qwen3_dist.ops.cpu.build import library
from qwen3_dist.parallel.shared_memory import Segment, SharedMemoryCommunicator

_SUMMED = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}
# Pointers and integers of each function in `cpu.cpp`, after the group and its last operation.
_SIGNATURES = {
    "exchange": "",
    "gather": "ppiii",
    "broadcast": "pi",
    "all_reduce": "pppi",
    "reduce_scatter": "ppi",
}
_KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_long}
_WAIT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_long, ctypes.c_long)


def fastest_communicator() -> type[SharedMemoryCommunicator]:
    """The communicator class for ranks of this machine: in C++ if the kernels could be built. Ranks of one group may
    use different classes."""
    return SharedMemoryCommunicator if library() is None else NativeSharedMemoryCommunicator


class NativeSharedMemoryCommunicator(SharedMemoryCommunicator):
    """Collectives in C++. Sums of dtypes that models do not use, and all-to-all, are in Python."""

    def __init__(
        self, rank: int, size: int, segment: Segment, watchers: dict[int, int], timeout_s: float
    ) -> None:
        super().__init__(rank, size, segment, watchers, timeout_s)
        path = library()
        assert path is not None, "the kernels are not built"
        loaded = ctypes.CDLL(str(path))
        structs.check_sizes(loaded)
        self._exchange_rounds = _function(loaded, "exchange")
        self._gather_rounds = _function(loaded, "gather")
        self._broadcast_rounds = _function(loaded, "broadcast")
        self._all_reduces = _functions(loaded, "all_reduce")
        self._reduce_scatters = _functions(loaded, "reduce_scatter")
        self._ticks = loaded.now_in_ticks
        self._ticks.argtypes, self._ticks.restype = [], ctypes.c_long
        self._first_tick, self._began_s = self._ticks(), time.perf_counter()
        self._lost: BaseException | None = None
        self._callback = _WAIT(self._watch_for_kernel)
        callback = ctypes.cast(self._callback, ctypes.c_void_p).value or 0
        slots = segment.slots
        self._group_struct = structs.Group(
            flags=segment.flags_address,
            slots=slots.data_ptr(),
            rank=rank,
            size=size,
            slot_bytes=segment.slot_bytes,
            wait=callback,
        )
        self._group = ctypes.addressof(self._group_struct)

    @property
    def waited_s(self) -> float:
        waited, elapsed = self._group_struct.waited_ticks, self._ticks() - self._first_tick
        return waited / elapsed * (time.perf_counter() - self._began_s) if waited else 0.0

    def all_reduce(self, x: Tensor) -> Tensor:
        function = self._all_reduces.get(x.dtype)
        if function is None:
            return super().all_reduce(x)
        x = x.contiguous()
        address = x.data_ptr()
        self._finish(function(self._group, self._operation, address, None, address, x.numel()))
        return x

    def add_all_reduced(self, x: Tensor, partial: Tensor) -> Tensor:
        function = self._all_reduces.get(x.dtype)
        if function is None or x.dtype != partial.dtype:
            return super().add_all_reduced(x, partial)
        x, partial = x.contiguous(), partial.contiguous()
        addresses = partial.data_ptr(), x.data_ptr(), partial.data_ptr()
        self._finish(function(self._group, self._operation, *addresses, partial.numel()))
        return partial

    def reduce_scatter(self, x: Tensor) -> Tensor:
        function = self._reduce_scatters.get(x.dtype)
        if function is None:
            return super().reduce_scatter(x)
        x = x.contiguous()
        out = x.new_empty(x.shape[0] // self.size, *x.shape[1:])
        self._finish(function(self._group, self._operation, x.data_ptr(), out.data_ptr(), out.numel()))
        return out

    def all_gather(self, x: Tensor) -> Tensor:
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        self._gather(x, out, x.nbytes, gives=True)
        return out

    def gather(self, x: Tensor) -> Tensor | None:
        rows, columns = x.shape
        out = x.new_empty(rows, self.size * columns) if self.rank == 0 else None
        self._gather(x, out, columns * x.itemsize, gives=self.rank != 0)
        return out

    def broadcast(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        self._finish(self._broadcast_rounds(self._group, self._operation, x.data_ptr(), x.nbytes))
        return x

    def in_kernel(self, kernel: Callable[[int, int], int]) -> bool:
        self._finish(kernel(self._group, self._operation))
        return True

    def _gather(self, x: Tensor, out: Tensor | None, row_bytes: int, gives: bool) -> None:
        x = x.contiguous()
        to = None if out is None else out.data_ptr()
        sizes = (x.nbytes, row_bytes, gives)
        self._finish(self._gather_rounds(self._group, self._operation, x.data_ptr(), to, *sizes))

    def _exchange(self) -> None:
        self._finish(self._exchange_rounds(self._group, self._operation))

    def _finish(self, operation: int) -> None:
        if operation < 0:
            assert self._lost is not None
            raise self._lost
        self._operation = operation

    def _watch_for_kernel(self, peer: int, operation: int) -> int:
        """C++ functions call this if a peer is late. They cannot pass exceptions on, so `_finish` raises the error."""
        try:
            self._watch(peer, operation)
        except BaseException as error:
            self._lost = error
            return 0
        return 1


def _function(loaded: ctypes.CDLL, name: str, suffix: str = "") -> ctypes._NamedFuncPointer:
    function = getattr(loaded, name + suffix)
    function.argtypes = [ctypes.c_void_p, ctypes.c_long, *(_KINDS[kind] for kind in _SIGNATURES[name])]
    function.restype = ctypes.c_long
    return function


def _functions(loaded: ctypes.CDLL, name: str) -> dict[torch.dtype, ctypes._NamedFuncPointer]:
    """The variants of a function by dtype. There is none for fp16 if the CPU cannot convert it."""
    return {
        dtype: _function(loaded, name, f"_{suffix}")
        for dtype, suffix in _SUMMED.items()
        if hasattr(loaded, f"{name}_{suffix}")
    }
