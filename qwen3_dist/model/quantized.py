"""Modules whose weights may be those of a quantised checkpoint."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from qwen3_dist.quantization import Grid


class Codes(NamedTuple):
    """What a quantised weight is made of: codes of `dtype`, and scales for the blocks of `grid`."""

    dtype: torch.dtype
    grid: Grid


class Quantizable(nn.Module):
    """A module with weights [..., N, D] that may be codes of a quantised checkpoint. Beside a weight `name` of codes
    is a parameter `name`_scale of its blocks' scales, fp32 [..., blocks of outputs, blocks of inputs]."""

    codes: dict[str, Codes]  # by the weight's name

    def hold_codes(self, name: str, codes: Codes) -> None:
        """Makes the weight `name`, on any device, one of codes. Its values are lost."""
        weight = self.get_parameter(name)
        scales = (*weight.shape[:-2], *codes.grid.shape(*weight.shape[-2:]))
        for parameter, tensor in (
            (name, torch.empty_like(weight, dtype=codes.dtype)),
            (f"{name}_scale", torch.empty(scales, dtype=torch.float32, device=weight.device)),
        ):
            self.register_parameter(parameter, nn.Parameter(tensor, requires_grad=False))
        self.codes = {**self.codes, name: codes}
