"""The operations of a CPU rank in deterministic mode. `docs/parallelism.md` describes the mode.

A row's result is the same bits for any number of rows, threads and ranks. The kernels are compiled for that
(`FIXED_WAY` in `cpu/simd.h`). torch's products and its sigmoid are not used: how torch computes a number depends on
the number of rows, or on where the number lies in a vector.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qwen3_dist.ops.base import BlockParts, ExpertWeights, HeadParts, StageKernels
from qwen3_dist.ops.cpu.ops import CpuOps
from qwen3_dist.ops.torch_draws import ordered_topk


class DeterministicCpuOps(CpuOps):
    """`CpuOps` of kernels that were loaded with `deterministic`."""

    def describe(self, experts: ExpertWeights | None) -> str:
        return f"{super().describe(experts)}, deterministic"

    def fuse(self, blocks: Sequence[BlockParts], head: HeadParts | None) -> StageKernels | None:
        return None  # fused kernels return partial sums

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return self._kernels.swiglu(gate, up)

    def route(self, logits: Tensor, choices: int, normed: bool) -> tuple[Tensor, Tensor]:
        return self._kernels.route(logits, choices, normed)

    def likeliest(self, logprobs: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return ordered_topk(logprobs, count)

    def expert_hidden(self, x: Tensor, weights: ExpertWeights, ids: Tensor, counts: Tensor) -> Tensor:
        return self._kernels.expert_hidden(x, weights, ids, counts[1:])

    def expert_outputs(
        self, hidden: Tensor, weights: ExpertWeights, ids: Tensor, routing: Tensor, outputs: int
    ) -> Tensor:
        return self._kernels.expert_outputs(hidden, weights, ids, routing, outputs)
