"""RMSNorm (arXiv 1910.07467) with Qwen3's order of rounding, and the reference architecture's options."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen3_dist.ops.kernels import row_kernels_for


class RMSNorm(nn.Module):
    """Normalises the last dimension: [..., emb_dim] -> the same shape and dtype.

    With `qwen3_compatible` the mean square is taken in fp32 and the result cast back before `scale`
    multiplies it, as the released checkpoints were trained; without, all is done in the input's dtype.
    `shift=True` adds a learned bias after the scale.
    """

    def __init__(self, emb_dim: int, eps: float, shift: bool = False, qwen3_compatible: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.qwen3_compatible = qwen3_compatible
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim)) if shift else None

    @property
    def is_plain(self) -> bool:
        """Whether it is Qwen3's own form, without options."""
        return self.qwen3_compatible and self.shift is None

    def forward(self, x: Tensor) -> Tensor:
        kernels = row_kernels_for(x) if self.is_plain else None
        if kernels is not None:
            return kernels.norm(x.contiguous(), self.scale, self.eps)
        wide = x.float() if self.qwen3_compatible else x
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        scaled = normed.to(x.dtype) * self.scale
        return scaled if self.shift is None else scaled + self.shift
