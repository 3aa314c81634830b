"""RMSNorm (arXiv 1910.07467) with Qwen3's order of rounding, and the reference architecture's options."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen3_dist.config import ModelConfig
from qwen3_dist.ops.base import NormWeights, Ops


class RMSNorm(nn.Module):
    """Normalises the last dimension: [..., dim] -> [..., dim] of the same dtype.

    With `config.qwen3_compatible` the input is normalised in fp32 and cast back before it is multiplied by `scale`, as
    the released checkpoints were trained. Otherwise all is computed in the input's dtype.
    `config.rms_norm_shift` adds a learned bias after the scale.
    """

    def __init__(self, config: ModelConfig, dim: int, ops: Ops) -> None:
        super().__init__()
        self._ops = ops
        self._eps = config.rms_norm_eps
        self._qwen3_compatible = config.qwen3_compatible
        self.scale = nn.Parameter(torch.ones(dim))
        self.shift = nn.Parameter(torch.zeros(dim)) if config.rms_norm_shift else None

    @property
    def weights(self) -> NormWeights:
        return NormWeights(self.scale, self._eps, self.shift, self._qwen3_compatible)

    def forward(self, x: Tensor) -> Tensor:
        return self._ops.norm(x, self.weights)
