"""Low-rank adapters (LoRA, arXiv 2106.09685) beside a product: y += scale * B (A x), another pair for each row.

Legend: T tokens of the step, n adapters, P of them in this step, R the largest rank, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3_dist.ops.adapter_rows import AdapterRows


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
