"""Copies between the host and a device that do not wait for running kernels.

A copy from pageable memory to a GPU makes the host wait for all earlier kernels; a copy from pinned memory is queued
like a kernel. So all inputs of a step are sent with `on_device` and `rows_on_device`, and results are read with
`ToHost`. On a CPU these are plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor


def on_device(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copies numbers, nested lists of numbers, or a CPU tensor of `dtype` to `device`."""
    host = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def rows_on_device(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, ...]:
    """Copies each row to `device` as an int64 vector, all rows in one copy."""
    return on_device([*chain(*rows)], torch.int64, device).split([len(row) for row in rows])


class ToHost:
    """An asynchronous copy of tensors to the host. `arrived` waits for it and for all earlier work on the stream."""

    def __init__(self, *parts: Tensor) -> None:
        self._parts = [part.to("cpu", non_blocking=True) for part in parts]  # into pinned memory
        on_gpu = next((part.device for part in parts if part.is_cuda), None)
        self._sent = None
        if on_gpu is not None:
            self._sent = torch.cuda.Event()
            self._sent.record(torch.cuda.current_stream(on_gpu))

    def ready(self) -> bool:
        """Whether `arrived` returns without waiting."""
        return self._sent is None or self._sent.query()

    def arrived(self) -> list[Tensor]:
        """Waits for the copy and returns the tensors on the host."""
        if self._sent is not None:
            self._sent.synchronize()
        return self._parts
