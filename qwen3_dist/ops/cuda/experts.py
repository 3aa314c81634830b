"""The experts of a rank by torch's grouped_mm. Legend as in `base.py`; P = T * K pairs of a row and a choice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_dist.ops.base import ExpertWeights
from qwen3_dist.ops.cuda.kernels import GpuKernels
from qwen3_dist.ops.quantize import kind_of

# Up to this number of pairs per expert, our kernel is used instead of torch's. On an H200 ours was still faster at 256
# (`benchmarks/results/gpu-check-1xH200.json`); more pairs were not measured.
FEW_PAIRS = 256


def has_grouped_mm(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `grouped_mm` runs without the host: for bf16 on compute capability 9. Otherwise torch 2.11 runs a loop
    on the host."""
    return (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and hasattr(F, "grouped_mm")
        and torch.cuda.get_device_capability(device)[0] == 9
    )


def takes_grouped_mm(weights: ExpertWeights) -> bool:
    """Whether `grouped_mm` supports these stacks: no int8, rows of a multiple of 16 bytes."""
    _, columns, dim = weights.stacks[0].shape
    return weights.scales is None and columns % 8 == dim % 8 == 0


def takes_codes(kernels: GpuKernels | None, weights: ExpertWeights) -> bool:
    """Whether our kernels read the codes of these stacks: fc1 and fc2, which they compute together, have the same
    blocks."""
    if kernels is None or weights.grids is None or weights.grids[0] != weights.grids[1]:
        return False
    return all(map(kernels.reads_codes, map(kind_of, weights.stacks, weights.grids)))


def grouped_experts(
    x: Tensor,
    weights: ExpertWeights,
    ids: Tensor,
    routing: Tensor,
    counts: Tensor,
    kernels: GpuKernels | None,
) -> Tensor:
    """Implements `Ops.experts` by three grouped products over pairs sorted by expert. `counts` [1 + e] has the number
    of pairs of each id, from -1 on.

    The host does not wait. Pairs with experts of other ranks are sorted to the end, which the products skip.
    """
    fc1, fc2, fc3 = (stack.transpose(1, 2) for stack in weights.stacks)
    (rows, choices), experts = ids.shape, fc1.shape[0]
    keys = torch.where(ids < 0, experts, ids).flatten()
    order = keys.argsort(stable=True)
    ends = counts[1:].cumsum(0, dtype=torch.int32)
    pairs = x[order // choices]
    gate, up = F.grouped_mm(pairs, fc1, offs=ends), F.grouped_mm(pairs, fc2, offs=ends)
    hidden = F.silu(gate) * up if kernels is None else kernels.swiglu(gate, up)
    answers = F.grouped_mm(hidden, fc3, offs=ends)[order.argsort()]
    if kernels is not None:
        return kernels.summed(answers, ids, routing)
    answers = answers.view(rows, choices, -1)
    answers = torch.where((ids >= 0)[..., None], answers.float() * routing[..., None], 0.0)
    return answers.sum(dim=1).to(x.dtype)
