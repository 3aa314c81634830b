"""Values from the host to a device and back, without waiting for what the device still computes.

A GPU takes a copy from ordinary memory only when all before it is done, and the host waits; a copy from pinned memory
stands in line like any kernel. So a step's inputs are all sent by `on_device` and `rows_on_device`, and what the host
wants to read comes `ToHost`. On a CPU all of this is what torch does anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor


def on_device(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers, nested lists of them, or a CPU tensor of `dtype`, as a tensor on `device`."""
    host = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def rows_on_device(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, ...]:
    """Each row as an int64 vector on `device`, all of them sent at once."""
    return on_device([*chain(*rows)], torch.int64, device).split([len(row) for row in rows])


class ToHost:
    """Tensors on their way to the host; `arrived` waits for them and for all that was asked of the device before."""

    def __init__(self, *parts: Tensor) -> None:
        self._parts = [part.to("cpu", non_blocking=True) for part in parts]  # into pinned memory
        on_gpu = next((part.device for part in parts if part.is_cuda), None)
        self._sent = None
        if on_gpu is not None:
            self._sent = torch.cuda.Event()
            self._sent.record(torch.cuda.current_stream(on_gpu))

    def ready(self) -> bool:
        """Whether `arrived` would not wait."""
        return self._sent is None or self._sent.query()

    def arrived(self) -> list[Tensor]:
        if self._sent is not None:
            self._sent.synchronize()
        return self._parts
