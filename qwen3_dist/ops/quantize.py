"""Quantization of weights to int8."""

from __future__ import annotations

import torch
from torch import Tensor


def as_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric per-channel quantization: weight [..., N, D] -> int8 [..., N, D] and fp32 scale [..., N].

    A scale covers only this rank's part of the inputs, so results depend slightly on the layout.
    """
    quantized = torch.empty_like(weight, dtype=torch.int8, requires_grad=False)
    scale = weight.detach().abs().amax(dim=-1).float().div_(127).clamp_(min=1e-30)
    few_rows = (
        each.split(4096)
        for each in (weight.detach().flatten(0, -2), quantized.flatten(0, -2), scale.flatten())
    )
    for wide, narrow, by in zip(*few_rows, strict=True):  # few rows at a time, so that fp32 copies are small
        narrow.copy_((wide.float() / by[:, None]).round_())
    return quantized, scale
