"""Low-rank adapters of the experts of a rank: for each token, y += scale * B (A x) in each product of an expert.

Every adapter has stacks of its own, like experts: A and B of each expert's fc1, fc2 and fc3. Those of an adapter are
never changed, so they are shared by the `ExpertLowRank`s before and after a change of adapters.

Legend: P pairs of a token and one of its experts, e experts of this rank, r the rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from qwen3_dist.ops.base import ExpertWeights, Ops

# a [e, r, inputs] and b [e, outputs, r] with the adapter's scale, of fc1, fc2 and fc3; None: it is not changed
Stacks = Sequence[tuple[Tensor, Tensor] | None]


@dataclass(frozen=True)
class ExpertAdapter:
    """One adapter's weights for a rank's experts of a layer, in the layout of the Ops."""

    a: ExpertWeights
    b: ExpertWeights
    ranks: tuple[int, ...]  # of fc1, fc2 and fc3; 0: not changed

    @classmethod
    def of(cls, stacks: Stacks, ops: Ops) -> ExpertAdapter | None:
        """None if it changes nothing."""
        there = next((pair for pair in stacks if pair is not None), None)
        if there is None:
            return None
        empty = tuple(
            each[:, :1, :1].contiguous() for each in there
        )  # stands for a matrix that is not changed
        a, b = (
            tuple(empty[i] if pair is None else pair[i].contiguous() for pair in stacks) for i in range(2)
        )
        ranks = tuple(0 if pair is None else pair[0].shape[1] for pair in stacks)
        return cls(_finalized(a, ops), _finalized(b, ops), ranks)


def _finalized(stacks: tuple[Tensor, ...], ops: Ops) -> ExpertWeights:
    fc1, fc2, fc3 = stacks
    return ops.finalize_experts(ExpertWeights((fc1, fc2, fc3), fc1.shape[1]), int8=False)


class ExpertLowRank:
    """The adapters of a rank's experts of a layer, by their places; None for one that does not change them."""

    def __init__(self, adapters: Sequence[ExpertAdapter | None], ops: Ops) -> None:
        self.adapters, self._ops = adapters, ops

    def add(self, y: Tensor, x: Tensor, which: int, ids: Tensor, numbers: Tensor) -> None:
        """Adds to y [P, outputs], in place, what the adapters change in the product of x [P, inputs] with fc1, fc2 or
        fc3 (`which` 0, 1 or 2). ids [P] are the experts, -1 for none; `numbers` [P] the adapters, counted from 1, 0
        for none. The host waits."""
        used = numbers.masked_fill(ids < 0, 0)
        for number in used.unique().tolist():
            adapter = self.adapters[number - 1] if number else None
            if adapter is not None and adapter.ranks[which]:
                rows = (used == number).nonzero()[:, 0]
                inner = self._ops.expert_product(x[rows], adapter.a, which, ids[rows], adapter.ranks[which])
                y[rows] += self._ops.expert_product(inner, adapter.b, which, ids[rows], y.shape[1])
