"""All operations in plain torch, for every device. Other `Ops` are tested against it and fall back to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_dist.ops.base import (
    BlockParts,
    ExpertWeights,
    HeadParts,
    LinearWeights,
    Matrix,
    NormWeights,
    StageKernels,
)
from qwen3_dist.ops.batch import LayerCache, StepBatch
from qwen3_dist.ops.kv_codes import write
from qwen3_dist.ops.quantize import as_int8, dequantized, tiles, uniform
from qwen3_dist.ops.slices import rows_of_slice
from qwen3_dist.ops.torch_attention import gathered_attention
from qwen3_dist.ops.torch_draws import TorchDraws
from qwen3_dist.ops.torch_experts import counted, looped_experts, matrices_of, pairs_by_expert


class TorchOps(TorchDraws):
    """`reason` says why no faster Ops is used."""

    def __init__(self, reason: str = "") -> None:
        self._reason = reason

    def describe(self, experts: ExpertWeights | None) -> str:
        because = f" ({self._reason})" if self._reason else ""
        return f"{cpu_threads()}: torch alone{because}"

    def finalize_linear(self, weights: LinearWeights, int8: bool) -> LinearWeights:
        return quantized_linear(weights) if int8 else LinearWeights(tuple(map(_simplest, weights.parts)))

    def finalize_experts(self, weights: ExpertWeights, int8: bool) -> ExpertWeights:
        return quantized_experts(weights) if int8 else simplest_experts(weights)

    def fuse(self, blocks: Sequence[BlockParts], head: HeadParts | None) -> StageKernels | None:
        return None

    def linear(self, x: Tensor, weights: LinearWeights) -> Sequence[Tensor]:
        return [self._product(x, part) for part in weights.parts]

    def _product(self, x: Tensor, part: Matrix) -> Tensor:
        if part.grid is not None:
            return self._product_of_codes(x, part)
        if part.scale is None:
            return F.linear(x, part.weight, part.bias)
        if x.dtype == torch.float16:  # sums of unscaled integers would overflow
            product = F.linear(x, part.weight.to(x.dtype).mul_(part.scale[:, None]))
        else:
            product = F.linear(x, part.weight.to(x.dtype)).mul_(part.scale)
        return product if part.bias is None else product + part.bias

    def _product_of_codes(self, x: Tensor, part: Matrix) -> Tensor:
        """`_product` with the codes of a quantised checkpoint, of which few at a time become weights of x's dtype."""
        assert part.grid is not None and part.scale is not None
        outs = []
        for rows in tiles(part.weight):
            codes = (part.weight, part.scale, part.grid)
            weight = dequantized(*codes, rows, x.dtype, part.zero, part.order)[:, : x.shape[1]]
            bias = part.bias[rows.start : rows.stop] if part.bias is not None else None
            outs.append(self._product(x, Matrix(weight, len(rows), bias=bias)))
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    def embedding(self, ids: Tensor, weights: LinearWeights) -> Tensor:
        return F.embedding(ids, weights.parts[0].weight)

    def norm(self, x: Tensor, weights: NormWeights) -> Tensor:
        wide = x.float() if weights.qwen3_compatible else x
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + weights.eps)
        scaled = normed.to(x.dtype) * weights.scale
        return scaled if weights.shift is None else scaled + weights.shift

    def rotate_and_store(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        norms: tuple[NormWeights, NormWeights] | None,
        cos: Tensor,
        sin: Tensor,
        cache: LayerCache,
        slots: Tensor,
    ) -> Tensor:
        if norms is not None:
            q, k = self.norm(q, norms[0]), self.norm(k, norms[1])
        write(cache.keys, slots, apply_rope(k, cos, sin), cache.key_scale)
        write(cache.values, slots, v, cache.value_scale)
        return apply_rope(q, cos, sin)

    def attention(self, q: Tensor, cache: LayerCache, batch: StepBatch, window: int | None) -> Tensor:
        return gathered_attention(q, cache, batch, window)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def route(self, logits: Tensor, choices: int, normed: bool) -> tuple[Tensor, Tensor]:
        probabilities = F.softmax(logits, dim=-1, dtype=torch.float32)
        weights, expert_ids = probabilities.topk(choices, dim=-1)
        if normed:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return expert_ids, weights.to(logits.dtype).float()

    def experts(
        self, x: Tensor, weights: ExpertWeights, ids: Tensor, routing: Tensor, counts: Tensor
    ) -> Tensor:
        """Computes many rows in slices, which limits memory even if every row chose experts of this rank."""
        x, ids, routing = x.contiguous(), ids.contiguous(), routing.contiguous()
        rows = rows_of_slice(ids.shape[1])
        if len(x) <= rows:
            return self._experts_of_slice(x, weights, ids, routing, counts)
        out = torch.empty_like(x)
        for mine, some, some_ids, some_routing in zip(
            *(each.split(rows) for each in (out, x, ids, routing)), strict=True
        ):
            mine.copy_(self._experts_of_slice(some, weights, some_ids, some_routing, counts))
        return out

    def _experts_of_slice(
        self, x: Tensor, weights: ExpertWeights, ids: Tensor, routing: Tensor, counts: Tensor
    ) -> Tensor:
        """`experts` of at most `rows_of_slice` contiguous rows."""
        counts += counted(ids, len(weights.stacks[0]))
        return looped_experts(x, weights, ids, routing, self._expert)

    def _expert(self, x: Tensor, matrices: tuple[Matrix, ...]) -> Tensor:
        fc1, fc2, fc3 = matrices
        return self._product(F.silu(self._product(x, fc1)) * self._product(x, fc2), fc3)

    def expert_hidden(self, x: Tensor, weights: ExpertWeights, ids: Tensor, counts: Tensor) -> Tensor:
        counts += counted(ids, len(weights.stacks[0]))
        out = x.new_zeros(len(x), weights.columns)
        for number, rows in pairs_by_expert(ids, len(weights.stacks[0])):
            fc1, fc2, _ = matrices_of(weights, number)
            out[rows] = self.swiglu(self._product(x[rows], fc1), self._product(x[rows], fc2))
        return out

    def expert_outputs(
        self, hidden: Tensor, weights: ExpertWeights, ids: Tensor, routing: Tensor, outputs: int
    ) -> Tensor:
        out = hidden.new_zeros(len(hidden), outputs)
        for number, rows in pairs_by_expert(ids, len(weights.stacks[0])):
            product = self._product(hidden[rows], matrices_of(weights, number)[2])
            out[rows] = (product.float() * routing[rows, None]).to(out.dtype)
        return out

    def expert_product(
        self, x: Tensor, weights: ExpertWeights, which: int, ids: Tensor, outputs: int
    ) -> Tensor:
        out = x.new_zeros(len(x), outputs)
        for number, rows in pairs_by_expert(ids, len(weights.stacks[which])):
            out[rows] = self._product(x[rows], matrices_of(weights, number)[which])
        return out

    def experts_stay_on_device(self, weights: ExpertWeights) -> bool:
        return False


def quantized_linear(weights: LinearWeights) -> LinearWeights:
    """Converts plain weights to int8."""
    return LinearWeights(tuple(_quantized(part) for part in weights.parts))


def _quantized(part: Matrix) -> Matrix:
    weight, scale = as_int8(part.weight)
    return part._replace(weight=weight, scale=scale)


def _simplest(part: Matrix) -> Matrix:
    """`part`, without a grid if its codes are int8 with a scale for each output."""
    has_more = part.weight.dtype != torch.int8 or part.zero is not None or part.order is not None
    if part.grid is None or part.scale is None or has_more:
        return part
    scale = uniform(part.scale, part.grid)
    return part if scale is None else part._replace(scale=scale.contiguous(), grid=None)


def simplest_experts(weights: ExpertWeights) -> ExpertWeights:
    """`_simplest` of stacks."""
    has_more = (
        weights.stacks[0].dtype != torch.int8 or weights.zeros is not None or weights.orders is not None
    )
    if weights.grids is None or weights.scales is None or has_more:
        return weights
    one, two, three = map(uniform, weights.scales, weights.grids)
    if one is None or two is None or three is None:
        return weights
    scales = (one.contiguous(), two.contiguous(), three.contiguous())
    return ExpertWeights(weights.stacks, weights.columns, scales)


def quantized_experts(weights: ExpertWeights) -> ExpertWeights:
    """Converts plain stacks to int8."""
    (fc1, one), (fc2, two), (fc3, three) = map(as_int8, weights.stacks)
    return ExpertWeights((fc1, fc2, fc3), weights.columns, (one, two, three))


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [T, H, d] by cos and sin [T, 1, d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def cpu_threads() -> str:
    """Describes the CPU threads of a rank."""
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''} a rank"
