"""The operations of a GPU rank in deterministic mode. `docs/parallelism.md` describes the mode.

A row's result is the same bits for any number of rows and ranks: products are our Triton kernel with one tile size,
and a query's keys are never split over programs. cuBLAS, `grouped_mm` and FlashAttention are not used, since they
choose how to compute by the number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qwen3_dist.ops.base import ExpertWeights, LinearWeights, Matrix
from qwen3_dist.ops.cuda.attention import UNSPLIT, Chosen
from qwen3_dist.ops.cuda.experts import takes_codes
from qwen3_dist.ops.cuda.kernels import GpuKernels
from qwen3_dist.ops.cuda.ops import CudaOps
from qwen3_dist.ops.quantize import kind_of
from qwen3_dist.ops.torch_draws import ordered_topk


class DeterministicCudaOps(CudaOps):
    """`CudaOps` that use Triton kernels alone. All of them must work."""

    _kernels: GpuKernels

    def __init__(
        self, device: torch.device, dtype: torch.dtype, kernels: Mapping[torch.dtype, GpuKernels | None]
    ) -> None:
        super().__init__(device, dtype, kernels, Chosen(UNSPLIT, ()), grouped_mm=False)

    def describe(self, experts: ExpertWeights | None) -> str:
        return f"{super().describe(experts)}, deterministic"

    def finalize_linear(self, weights: LinearWeights, int8: bool) -> LinearWeights:
        # Parts are not joined: each is a product.
        return self._tried(super(CudaOps, self).finalize_linear(weights, int8))

    def linear(self, x: Tensor, weights: LinearWeights) -> Sequence[Tensor]:
        return [self._product(x, part) for part in weights.parts]

    def _product(self, x: Tensor, part: Matrix) -> Tensor:
        if part.grid is not None and not self._kernels.reads_codes(kind_of(part.weight, part.grid)):
            return self._product_of_codes(x, part)
        if part.grid is not None:
            product = self._kernels.fixed_linear_codes(x.contiguous(), part)
        else:
            product = self._kernels.fixed_linear(x.contiguous(), part.weight, part.scale)
        return product if part.bias is None else product + part.bias

    def log_softmax(self, logits: Tensor) -> Tensor:
        return self._kernels.log_softmax(logits.contiguous())

    def likeliest(self, logprobs: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return ordered_topk(logprobs, count)

    def expert_hidden(self, x: Tensor, weights: ExpertWeights, ids: Tensor, counts: Tensor) -> Tensor:
        if weights.grids is not None:
            if not takes_codes(self._kernels, weights):
                return super().expert_hidden(x, weights, ids, counts)
            return self._kernels.hidden_of_codes(x.contiguous(), weights, ids, counts)
        return self._kernels.expert_hidden(x.contiguous(), weights.stacks, weights.scales, ids, counts)

    def expert_outputs(
        self, hidden: Tensor, weights: ExpertWeights, ids: Tensor, routing: Tensor, outputs: int
    ) -> Tensor:
        if weights.grids is not None:
            if not takes_codes(self._kernels, weights):
                return super().expert_outputs(hidden, weights, ids, routing, outputs)
            answers = self._kernels.outputs_of_codes(hidden.contiguous(), weights, ids)
        else:
            scale = weights.scales[2] if weights.scales else None
            answers = self._kernels.expert_outputs(hidden.contiguous(), weights.stacks[2], scale, ids)
        return self._kernels.summed(answers, ids[:, None], routing[:, None])

    def expert_product(
        self, x: Tensor, weights: ExpertWeights, which: int, ids: Tensor, outputs: int
    ) -> Tensor:
        if weights.grids is not None:
            return super().expert_product(x, weights, which, ids, outputs)
        scale = weights.scales[which] if weights.scales else None
        answers = self._kernels.expert_outputs(x.contiguous(), weights.stacks[which], scale, ids)
        return answers.masked_fill_(ids[:, None] < 0, 0)
