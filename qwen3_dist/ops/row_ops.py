"""The part that `CpuOps` and `CudaOps` share: norms and RoPE with KV-cache writes, by kernels of the device."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from qwen3_dist.ops.base import NormWeights
from qwen3_dist.ops.batch import LayerCache
from qwen3_dist.ops.torch_ops import TorchOps


class RowKernels(Protocol):
    """Kernels of a device for norms and RoPE."""

    def norm(self, x: Tensor, scale: Tensor, eps: float) -> Tensor: ...

    def rotate(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: LayerCache,
        scales: tuple[Tensor, Tensor] | None,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        eps: float,
    ) -> Tensor: ...


class RowKernelOps(TorchOps):
    """Uses kernels for Qwen3's norms, and plain torch for norms with options of the reference architecture."""

    _kernels: RowKernels | None

    def norm(self, x: Tensor, weights: NormWeights) -> Tensor:
        if self._kernels is None or not weights.is_plain:
            return super().norm(x, weights)
        return self._kernels.norm(x.contiguous(), weights.scale, weights.eps)

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
        if self._kernels is None or (norms is not None and not norms[0].is_plain):
            return super().rotate_and_store(q, k, v, norms, cos, sin, cache, slots)
        scales, eps = (None, 0.0) if norms is None else ((norms[0].scale, norms[1].scale), norms[0].eps)
        return self._kernels.rotate(q, k, v, cache, scales, cos, sin, slots, eps)
