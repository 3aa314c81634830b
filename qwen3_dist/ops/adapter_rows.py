"""The LoRA adapter of each token of a step.

Legend: T tokens of the step, n adapters, P adapters that this step uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_dist.ops.transfer import rows_on_device


@dataclass(frozen=True)
class AdapterRows:
    """The adapter of each row; a row may have none."""

    present: slice | Tensor  # the P adapters: a slice of the n adapters, or their indices [P] int64
    excluded: Tensor  # [T, P, 1] bool, true where the row does not use the adapter
    numbers: tuple[int, ...]  # [P] indices of the adapters, on the host
    by_row: Tensor  # [T] int64, the number of each row's adapter, counted from 1; 0: none

    @classmethod
    def of(cls, numbers: Sequence[int], device: torch.device) -> AdapterRows | None:
        """From the adapter number of each row [T], counted from 1; 0 is none. Returns None if no row has an
        adapter."""
        present = sorted(set(numbers) - {0})
        if not present:
            return None
        asked, there = rows_on_device((numbers, present), device)
        excluded = asked[:, None, None] != there[:, None]
        numbers = tuple(number - 1 for number in present)
        if present[-1] - present[0] < len(present):
            return cls(slice(present[0] - 1, present[-1]), excluded, numbers, asked)
        return cls(there - 1, excluded, numbers, asked)

    @classmethod
    def of_all(cls, by_row: Tensor, count: int) -> AdapterRows:
        """From `by_row` [T] on the device, where the host does not know which of `count` adapters occur."""
        there = torch.arange(1, count + 1, device=by_row.device)
        return cls(slice(0, count), by_row[:, None, None] != there[:, None], tuple(range(count)), by_row)
