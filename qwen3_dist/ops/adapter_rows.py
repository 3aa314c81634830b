"""Which rows of a step belong to which LoRA adapter.

Legend: T tokens of the step, n adapters, P of them in this step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_dist.ops.transfer import rows_on_device


@dataclass(frozen=True)
class AdapterRows:
    """Which rows of a step belong to which adapter; a row may belong to none."""

    present: slice | Tensor  # P of the n adapters: a run of them, or [P] int64
    foreign: Tensor  # [T, P, 1] bool, rows that are not of the adapter

    @classmethod
    def of(cls, numbers: Sequence[int], device: torch.device) -> AdapterRows | None:
        """Of each row's adapter [T], counted from 1, 0 being none; None if no row has one."""
        present = sorted(set(numbers) - {0})
        if not present:
            return None
        asked, there = rows_on_device((numbers, present), device)
        foreign = asked[:, None, None] != there[:, None]
        if present[-1] - present[0] < len(present):
            return cls(slice(present[0] - 1, present[-1]), foreign)
        return cls(there - 1, foreign)
