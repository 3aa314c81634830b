"""Random weights in place of a checkpoint, for measurements without a download."""

from __future__ import annotations

import zlib
from math import prod

import torch
from torch import Tensor

from qwen3_dist.ops.quantize import packed
from qwen3_dist.quantization import NIBBLES
from qwen3_dist.weights.pieces import DIVISOR, MULTIPLIER, ORDER, SCALE, ZERO, Piece

_LARGEST, _LARGEST_NIBBLE = 120, 7  # of codes
_USUAL_INPUTS = 4096  # where a scale is for all inputs
_CHUNK = 1 << 22  # elements generated at a time: limits memory, and a rank generates few rows of other ranks


def fill(piece: Piece, view: Tensor) -> None:
    """Fills `view`, of the piece's shape, with random weights.

    On one kind of device, values do not depend on the layout, nor on the dtype except for rounding. Norms are 1,
    biases 0, matrices uniform with a standard deviation of 1 / sqrt(inputs). Codes of a quantised checkpoint are
    uniform up to their largest, and their scales give about the same deviation.
    """
    grid = piece.grid
    if piece.stored in (DIVISOR, MULTIPLIER):
        return
    if piece.stored == SCALE and grid is not None:
        largest = _LARGEST_NIBBLE if grid.nibbles else _LARGEST
        view.fill_((3 / min(piece.shape[-1] * grid.columns, _USUAL_INPUTS)) ** 0.5 / largest)
        return
    if piece.stored == ZERO and grid is not None:
        view.fill_(8 if grid.nibbles else 0)
        return
    if piece.stored == ORDER and grid is not None:
        view.copy_(torch.tensor(piece.ranges[-1], device=view.device) // grid.columns)
        return
    if len(piece.shape) == 1:
        view.fill_(0.0 if piece.source.endswith("bias") else 1.0)
        return
    total, *inner = piece.shape
    first, stop, _ = piece.index[0].indices(total)
    height = max(1, _CHUNK // prod(inner))
    scale = (3 / piece.shape[-1]) ** 0.5 / 2**15 if piece.stored is None else _LARGEST / 2**15
    for chunk in range(first // height, -(-stop // height)):
        top = chunk * height
        low, high = max(first, top), min(stop, top + height)
        whole = _int16(f"{piece.source}/{chunk}", (min(height, total - top), *inner), view.device)
        part = whole[(slice(low - top, high - top), *piece.index[1:])]
        out = view[low - first : high - first]
        if piece.stored in NIBBLES:
            out.copy_(packed((part & 15).to(torch.uint8)))
        else:
            out.copy_(part * scale) if piece.stored else out.copy_(part).mul_(scale)


def _int16(seed: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Uniform int16 numbers, four from each random int64, which takes an eighth of the time of random floats."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(seed.encode()))
    draws = torch.empty(-(-prod(shape) // 4), dtype=torch.int64, device=device)
    draws.random_(-(2**63), None, generator=generator)
    return draws.view(torch.int16)[: prod(shape)].view(shape)
