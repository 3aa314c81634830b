"""The experts of a rank in plain torch. Legend as in `base.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qwen3_dist.ops.base import ExpertWeights

SwiGlu = Callable[[Tensor, tuple[Tensor, ...], "tuple[Tensor | None, ...]"], Tensor]


def counted(ids: Tensor, num_experts: int) -> Tensor:
    """The number of occurrences of each id in `ids`, from -1 on -> [1 + e] int64."""
    chosen = (ids + 1).flatten()
    return chosen.new_zeros(1 + num_experts).scatter_add_(0, chosen, torch.ones_like(chosen))


def looped_experts(x: Tensor, weights: ExpertWeights, ids: Tensor, routing: Tensor, expert: SwiGlu) -> Tensor:
    """Implements `Ops.experts` as a loop over experts; `expert` computes one on its rows [n, D]. The host waits for
    the counts."""
    rows, choice = (ids >= 0).nonzero(as_tuple=True)
    order = ids[rows, choice].argsort(stable=True)
    rows, choice = rows[order], choice[order]
    counts = torch.bincount(ids[rows, choice], minlength=len(weights.stacks[0])).tolist()
    out = torch.zeros_like(x, dtype=torch.float32)
    start = 0
    for number, count in enumerate(counts):
        if count:
            pairs = slice(start, start + count)
            matrices = tuple(stack[number] for stack in weights.stacks)
            scales = tuple(scale[number] for scale in weights.scales) if weights.scales else (None,) * 3
            answers = expert(x[rows[pairs]], matrices, scales)
            out.index_add_(0, rows[pairs], answers.float() * routing[rows[pairs], choice[pairs], None])
            start += count
    return out.to(x.dtype)
