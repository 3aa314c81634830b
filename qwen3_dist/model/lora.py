"""Low-rank adapters (LoRA, arXiv 2106.09685) of a linear layer: y += scale * B (A x), with A and B chosen by row.

Legend: T tokens of the step, n adapters, P adapters that this step uses, R the largest rank, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen3_dist.ops.adapter_rows import AdapterRows
from qwen3_dist.ops.base import LinearWeights, Matrix, Ops

# What a layer has of one adapter: weights a [r, I] and b [r, O], the place of an adapter in the `LowRank` before, or
# nothing.
Source = tuple[Tensor, Tensor] | int | None


class LowRank:
    """The weights of n adapters for one linear layer on this rank.

    `a` is [n, R, I], `b` is [n, R, O] with the adapters' scales included. Both are zero beyond the rank of an adapter,
    which `ranks` has; 0: it does not change the layer.
    """

    def __init__(self, a: Tensor, b: Tensor, ranks: Sequence[int] = ()) -> None:
        self.a, self.b, self.ranks = a, b, ranks

    @classmethod
    def of(cls, sources: Sequence[Source], before: LowRank | None, ops: Ops) -> LowRank | None:
        """The adapters of `sources`, in this order; those of `before` are copied. None if none changes the layer."""
        pairs = [
            (before.pair(each) if before else None) if isinstance(each, int) else each for each in sources
        ]
        there = {place: pair for place, pair in enumerate(pairs) if pair is not None}
        if not there:
            return None
        ranks = [len(there[place][0]) if place in there else 0 for place in range(len(pairs))]
        a, b = next(iter(there.values()))
        a, b = (each.new_zeros(len(pairs), max(ranks), each.shape[1]) for each in (a, b))
        for place, (its_a, its_b) in there.items():
            a[place, : len(its_a)], b[place, : len(its_b)] = its_a, its_b
        return LowRank(a, b, ranks)

    @property
    def count(self) -> int:
        """n."""
        return len(self.a)

    def pair(self, place: int) -> tuple[Tensor, Tensor] | None:
        """The a [r, I] and b [r, O] of an adapter; None if it does not change the layer."""
        rank = self.ranks[place]
        return (self.a[place, :rank], self.b[place, :rank]) if rank else None

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
    depends neither on the adapters of other rows nor on those that are loaded beside its own."""

    def __init__(self, weights: Sequence[tuple[LinearWeights, LinearWeights] | None], ops: Ops) -> None:
        self._weights, self._ops = weights, ops

    @classmethod
    def of(cls, sources: Sequence[Source], before: LowRank | None, ops: Ops) -> LowRank | None:
        def finalized(weight: Tensor) -> LinearWeights:
            return ops.finalize_linear(LinearWeights((Matrix(weight.contiguous(), len(weight)),)), int8=False)

        kept = before._weights if isinstance(before, DeterministicLowRank) else None
        weights = [
            (finalized(each[0]), finalized(each[1].t()))
            if isinstance(each, tuple)
            else kept[each]
            if isinstance(each, int) and kept
            else None
            for each in sources
        ]
        return cls(weights, ops) if any(weights) else None

    @property
    def count(self) -> int:
        return len(self._weights)

    def add(self, y: Tensor, x: Tensor, rows: AdapterRows) -> None:
        for column, number in enumerate(rows.numbers):
            pair = self._weights[number]
            if pair is not None:
                change = self._ops.linear(self._ops.linear(x, pair[0])[0], pair[1])[0]
                y += change.masked_fill_(rows.excluded[:, column], 0)
