"""Weights from a seed in place of a checkpoint, so that a shape can be measured with nothing to download."""

from __future__ import annotations

import zlib
from math import prod

import torch
from torch import Tensor

from qwen3_dist.weights.weight_plan import Piece

_CHUNK = 1 << 22  # elements drawn at a time: bounds the memory, and lets a rank draw few rows but its own


def fill(piece: Piece, view: Tensor) -> None:
    """Fills `view`, of the piece's shape, with random weights.

    Values are equal for every layout and, up to rounding, for every dtype on one kind of device. Norms are 1, biases
    0, matrices uniform with a standard deviation of 1 / sqrt(inputs).
    """
    if len(piece.shape) == 1:
        view.fill_(0.0 if piece.source.endswith("bias") else 1.0)
        return
    total, *inner = piece.shape
    first, stop, _ = piece.index[0].indices(total)
    height = max(1, _CHUNK // prod(inner))
    scale = (3 / piece.shape[-1]) ** 0.5 / 2**15
    for chunk in range(first // height, -(-stop // height)):
        top = chunk * height
        low, high = max(first, top), min(stop, top + height)
        whole = _int16(f"{piece.source}/{chunk}", (min(height, total - top), *inner), view.device)
        part = whole[(slice(low - top, high - top), *piece.index[1:])]
        view[low - first : high - first].copy_(part).mul_(scale)


def _int16(seed: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Uniform over all of int16: four of them from each draw, which costs an eighth of drawing floats."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(seed.encode()))
    draws = torch.empty(-(-prod(shape) // 4), dtype=torch.int64, device=device)
    draws.random_(-(2**63), None, generator=generator)
    return draws.view(torch.int16)[: prod(shape)].view(shape)
