"""Modules whose weights may be those of a quantised checkpoint."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from qwen3_dist.quantization import Grid


class Codes(NamedTuple):
    """What a quantised weight is made of: codes of `dtype`, and what belongs to them for the blocks of `grid`: scales,
    and if the checkpoint has them zeros and the order of inputs."""

    dtype: torch.dtype
    grid: Grid
    companions: tuple[str, ...] = ("scale",)


class Quantizable(nn.Module):
    """A module with weights [..., N, D] that may be codes of a quantised checkpoint, uint8 [..., N, D / 2] if codes
    have 4 bits. Beside a weight `name` of codes are parameters:

    - `name`_scale, fp32 [..., blocks of outputs, blocks of inputs];
    - `name`_zero, int8 of the same shape, if codes have zeros of their own;
    - `name`_order, int32 [..., D], the group of each input, if inputs name their groups.
    """

    codes: dict[str, Codes]  # by the weight's name

    def hold_codes(self, name: str, codes: Codes) -> None:
        """Makes the weight `name`, on any device, one of codes. Its values are lost."""
        weight = self.get_parameter(name)
        *lead, outputs, inputs = weight.shape
        blocks = (*lead, *codes.grid.shape(outputs, inputs))
        width = -(-inputs // 2) if codes.grid.nibbles else inputs
        shapes = {
            "": ((*lead, outputs, width), codes.dtype),
            "scale": (blocks, torch.float32),
            "zero": (blocks, torch.int8),
            "order": ((*lead, inputs), torch.int32),
        }
        for part in ("", *codes.companions):
            tensor = torch.empty(shapes[part][0], dtype=shapes[part][1], device=weight.device)
            parameter = nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(f"{name}_{part}" if part else name, parameter)
        self.codes = {**self.codes, name: codes}
