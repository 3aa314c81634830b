"""Low-rank adapters (LoRA, arXiv 2106.09685) of a linear layer: y += scale * B (A x), with A and B chosen by row.

Legend: T tokens of the step, n adapters, P adapters that this step uses, R the largest rank, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3_dist.ops.adapter_rows import AdapterRows
from qwen3_dist.ops.base import LinearWeights, Matrix, Ops


class LowRank:
    """The weights of n adapters for one linear layer on this rank.

    `a` is [n, R, I], `b` is [n, R, O] with the adapters' scales included. Both are zero beyond the rank of an adapter.
    """

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b

    def add(self, y: Tensor, x: Tensor, rows: AdapterRows) -> None:
        """Adds the adapters' outputs for x [T, I] to y [T, O], in place.

        Each row is multiplied by all P adapters and the products with adapters that it does not use are set to 0. That
        takes two matrix products and copies no weights.
        """
        a, b = self.a[rows.present], self.b[rows.present]
        inner = torch.mm(x, a.flatten(0, 1).t()).unflatten(1, a.shape[:2])
        y.addmm_(inner.masked_fill_(rows.excluded, 0).flatten(1), b.flatten(0, 1))


class DeterministicLowRank(LowRank):
    """In deterministic mode: the products are those of the Ops, one adapter after the other, so that a row's result
    does not depend on the adapters of other rows."""

    def __init__(self, a: Tensor, b: Tensor, ops: Ops) -> None:
        self._ops = ops
        self._pairs = [
            (self._weights(each), self._weights(its_b.t())) for each, its_b in zip(a, b, strict=True)
        ]

    def _weights(self, weight: Tensor) -> LinearWeights:
        plain = LinearWeights((Matrix(weight.contiguous(), len(weight)),))
        return self._ops.finalize_linear(plain, int8=False)

    def add(self, y: Tensor, x: Tensor, rows: AdapterRows) -> None:
        for column, number in enumerate(rows.numbers):
            a, b = self._pairs[number]
            change = self._ops.linear(self._ops.linear(x, a)[0], b)[0]
            y += change.masked_fill_(rows.excluded[:, column], 0)
