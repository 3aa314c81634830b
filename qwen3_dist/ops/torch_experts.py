"""The experts of a rank in plain torch. Legend as in `base.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qwen3_dist.ops.base import ExpertWeights, Matrix

SwiGlu = Callable[[Tensor, tuple[Matrix, ...]], Tensor]


def counted(ids: Tensor, num_experts: int) -> Tensor:
    """The number of occurrences of each id in `ids`, from -1 on -> [1 + e] int64."""
    chosen = (ids + 1).flatten()
    return chosen.new_zeros(1 + num_experts).scatter_add_(0, chosen, torch.ones_like(chosen))


def looped_experts(x: Tensor, weights: ExpertWeights, ids: Tensor, routing: Tensor, expert: SwiGlu) -> Tensor:
    """Implements `Ops.experts` as a loop over experts; `expert` computes one on its rows [n, D]. The host waits for
    the counts."""
    choices = ids.shape[1]
    out = torch.zeros_like(x, dtype=torch.float32)
    for number, pairs in pairs_by_expert(ids.flatten(), len(weights.stacks[0])):
        rows = pairs // choices
        answers = expert(x[rows], matrices_of(weights, number))
        out.index_add_(0, rows, answers.float() * routing.flatten()[pairs, None])
    return out.to(x.dtype)


def pairs_by_expert(ids: Tensor, experts: int) -> Iterator[tuple[int, Tensor]]:
    """Each expert that occurs in ids [P], with the indices where it does, in their order. The host waits."""
    counts = torch.bincount(ids + 1, minlength=1 + experts).tolist()
    for number, pairs in enumerate(ids.argsort(stable=True).split(counts), start=-1):
        if number >= 0 and len(pairs):
            yield number, pairs


def matrices_of(weights: ExpertWeights, number: int) -> tuple[Matrix, ...]:
    """fc1, fc2 and fc3 of one expert."""
    triples = (weights.stacks, weights.scales, weights.zeros, weights.orders)
    parts = (tuple(each[number] for each in triple) if triple else (None,) * 3 for triple in triples)
    grids = weights.grids or (None,) * 3
    return tuple(
        Matrix(weight, len(weight), scale, None, grid, zero, order)
        for weight, scale, zero, order, grid in zip(*parts, grids, strict=True)
    )
