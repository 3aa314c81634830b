"""Norms, and rotations with their cache writes, by a device's kernels where these know the form."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from qwen3_dist.ops.base import NormWeights
from qwen3_dist.ops.batch import LayerCache
from qwen3_dist.ops.torch_ops import TorchOps


class RowKernels(Protocol):
    """What a device's kernels do to rows between products."""

    def norm(self, x: Tensor, scale: Tensor, eps: float) -> Tensor: ...

    def rotate(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: Tensor,
        values: Tensor,
        scales: tuple[Tensor, Tensor] | None,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        eps: float,
    ) -> Tensor: ...


class RowKernelOps(TorchOps):
    """Takes kernels for norms of Qwen3's own form, and torch for those with the reference architecture's options."""

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
        return self._kernels.rotate(q, k, v, cache.keys, cache.values, scales, cos, sin, slots, eps)
