"""Keys and values as e4m3 codes, in plain torch: what the kernels of all devices compute."""

from __future__ import annotations

import torch
from torch import Tensor

CODES = torch.float8_e4m3fn
_LARGEST = torch.finfo(CODES).max


def encode(x: Tensor, scale: float) -> Tensor:
    """The codes of x / scale; those of what is too large are the largest, 448, since no code is infinite."""
    return (x.float() * (1 / scale)).clamp(-_LARGEST, _LARGEST).to(CODES)


def write(cache: Tensor, slots: Tensor, x: Tensor, scale: float) -> None:
    """Writes x [T, G, d] to `slots` [T] of keys or values [blocks, block_size, G, d]; as codes, if they are."""
    if cache.dtype == CODES:  # torch indexes bytes on every device
        cache, x = cache.view(torch.uint8), encode(x, scale).view(torch.uint8)
    cache.flatten(0, 1)[slots] = x


def read(cache: Tensor, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """The `blocks` of keys or values, without their scale."""
    if cache.dtype == CODES:
        return cache.view(torch.uint8)[blocks].view(CODES).to(dtype)
    return cache[blocks]
