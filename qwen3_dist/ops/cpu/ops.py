"""The operations of a CPU rank: C++ kernels on packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_dist.ops.base import (
    BlockParts,
    ExpertWeights,
    HeadParts,
    LinearWeights,
    Matrix,
    MoEParts,
    StageKernels,
)
from qwen3_dist.ops.batch import LayerCache, StepBatch
from qwen3_dist.ops.cpu.block_kernels import CpuStageKernels
from qwen3_dist.ops.cpu.kernels import GROUPED, Kernels
from qwen3_dist.ops.quantize import kind_of
from qwen3_dist.ops.row_ops import RowKernelOps
from qwen3_dist.ops.torch_draws import WIDTH
from qwen3_dist.ops.torch_ops import cpu_threads


@dataclass(frozen=True)
class PackedLinear(LinearWeights):
    """Weights of one dtype, packed in panels (`cpu/panels.h`)."""

    inner: int  # D


@dataclass(frozen=True)
class SeparateLinear(LinearWeights):
    """Packed weights of several dtypes: of a layer of which a quantised checkpoint quantises some parts only."""

    each: tuple[PackedLinear, ...]


@dataclass(frozen=True)
class PackedExperts(ExpertWeights):
    """Stacks of packed matrices, [e, ceil(N / panel), D, panel]."""


class CpuOps(RowKernelOps):
    """Uses C++ kernels for packed weights and plain norms, and torch for the rest."""

    _kernels: Kernels

    def __init__(self, kernels: Kernels, of_fp32: Kernels) -> None:
        """`kernels` are for the activations' dtype, `of_fp32` for fp32 logits."""
        super().__init__()
        self._kernels = kernels
        self._of_fp32 = of_fp32

    def describe(self, experts: ExpertWeights | None) -> str:
        return f"{cpu_threads()}: C++ kernels"

    def finalize_linear(self, weights: LinearWeights, int8: bool) -> LinearWeights:
        parts = super().finalize_linear(weights, int8).parts
        inner, packed = parts[0].weight.shape[1], tuple(map(self._packed, parts))
        dtypes = {part.weight.dtype for part in packed}
        if len(dtypes) == 1:
            return PackedLinear(packed, inner)
        return SeparateLinear(packed, tuple(PackedLinear((part,), inner) for part in packed))

    def _packed(self, part: Matrix) -> Matrix:
        weight, scale = part.weight, part.scale
        if part.grid is not None and scale is not None:
            kind = kind_of(weight, part.grid)
            scale = self._kernels.pack_scales(scale, part.grid, part.outputs, kind, part.zero, part.order)
            weight = _in_groups(weight)
        return Matrix(self._kernels.pack(weight), part.outputs, scale, part.bias)

    def finalize_experts(self, weights: ExpertWeights, int8: bool) -> ExpertWeights:
        weights = super().finalize_experts(weights, int8)
        stacks, scales = weights.stacks, weights.scales
        if scales is not None and weights.grids is not None:
            none = (None,) * 3
            outputs = (stack.shape[1] for stack in stacks)
            more = (map(kind_of, stacks, weights.grids), weights.zeros or none, weights.orders or none)
            one, two, three = map(self._kernels.pack_scales, scales, weights.grids, outputs, *more)
            scales, stacks = (one, two, three), tuple(map(_in_groups, stacks))  # type: ignore[assignment]
        fc1, fc2, fc3 = map(self._kernels.pack, stacks)
        return PackedExperts((fc1, fc2, fc3), weights.columns, scales)

    def fuse(self, blocks: Sequence[BlockParts], head: HeadParts | None) -> StageKernels | None:
        norms = [part.norm for block in blocks for part in block]
        for attention, _ in blocks:
            norms += [norm for norm in (attention.q_norm, attention.k_norm) if norm is not None]
        norms += [head.norm] if head is not None else []
        if not _of_one_kind(blocks, head) or not all(norm.is_plain for norm in norms):
            return None
        return CpuStageKernels(self._kernels, blocks, head)

    def linear(self, x: Tensor, weights: LinearWeights) -> Sequence[Tensor]:
        if isinstance(weights, SeparateLinear):
            return [self.linear(x, each)[0] for each in weights.each]
        if not isinstance(weights, PackedLinear):
            return super().linear(x, weights)
        return self._kernels.linear(x.contiguous(), *weights.parts)

    def embedding(self, ids: Tensor, weights: LinearWeights) -> Tensor:
        if not isinstance(weights, PackedLinear):
            return super().embedding(ids, weights)
        return self._kernels.packed_rows(weights.parts[0].weight, ids.contiguous(), weights.inner)

    def attention(self, q: Tensor, cache: LayerCache, batch: StepBatch, window: int | None) -> Tensor:
        metadata = (batch.block_tables, batch.table_rows, batch.context_lens, batch.query_starts)
        return self._kernels.attention(q, cache, *metadata, window)

    def experts(
        self, x: Tensor, weights: ExpertWeights, ids: Tensor, routing: Tensor, counts: Tensor
    ) -> Tensor:
        if not isinstance(weights, PackedExperts):
            return super().experts(x, weights, ids, routing, counts)
        return self._kernels.experts(x, weights, ids, routing, counts[1:])

    def expert_product(
        self, x: Tensor, weights: ExpertWeights, which: int, ids: Tensor, outputs: int
    ) -> Tensor:
        if not isinstance(weights, PackedExperts):
            return super().expert_product(x, weights, which, ids, outputs)
        ones = torch.ones(len(x), dtype=torch.float32)
        return self._kernels.expert_outputs(x.contiguous(), weights, ids.contiguous(), ones, outputs, which)

    def greedy(self, logits: Tensor) -> Tensor:
        return self._kernels_for(logits).argmax(logits)

    def _largest_of_blocks(self, logits: Tensor) -> Tensor:
        return self._kernels_for(logits).block_max(logits.contiguous(), WIDTH)

    def _kernels_for(self, logits: Tensor) -> Kernels:
        return self._of_fp32 if logits.dtype == torch.float32 else self._kernels


def _in_groups(codes: Tensor) -> Tensor:
    """Codes with scales of groups, in the dtype by which kernels are chosen: codes of a byte go by that of fp8."""
    return codes.view(torch.float8_e4m3fn) if codes.dtype == torch.int8 else codes


def _of_one_kind(blocks: Sequence[BlockParts], head: HeadParts | None) -> bool:
    """Whether all weights of the blocks are packed and of one dtype, and the head's of the one that goes with it."""
    dtypes = set()
    for attention, feed_forward in blocks:
        linears = [attention.qkv, attention.out]
        if isinstance(feed_forward, MoEParts):
            if not isinstance(feed_forward.experts, PackedExperts):
                return False
            dtypes |= {stack.dtype for stack in feed_forward.experts.stacks}
        else:
            linears += [feed_forward.gate_up, feed_forward.down]
        if not all(isinstance(linear, PackedLinear) for linear in linears):
            return False
        dtypes |= {part.weight.dtype for linear in linears for part in linear.parts}
    if head is not None:
        of_head = head.weights.parts[0].weight.dtype
        dtypes |= {of_head} if not dtypes <= set(GROUPED) else set()
    return len(dtypes) <= 1
