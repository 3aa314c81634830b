"""Low-rank adapters (LoRA, arXiv 2106.09685) beside a product: y += scale * B (A x), another pair for each row.

Legend: T tokens of the step, n adapters, P of them in this step, R the largest rank, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_dist.transfer import rows_on_device


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


class LowRank:
    """What n adapters add to one product on this rank.

    `a` is [n, R, I] and `b` [n, R, O], with the adapters' scales in it; both are zero beyond an adapter's own rank.
    """

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b

    def add(self, y: Tensor, x: Tensor, rows: AdapterRows) -> None:
        """Adds to y [T, O] what the rows' adapters make of x [T, I].

        A row is multiplied by all of the step's adapters, and what others made of it left out: two products, and
        no copy of an adapter for each row.
        """
        a, b = self.a[rows.present], self.b[rows.present]
        inner = torch.mm(x, a.flatten(0, 1).t()).unflatten(1, a.shape[:2])
        y.addmm_(inner.masked_fill_(rows.foreign, 0).flatten(1), b.flatten(0, 1))
