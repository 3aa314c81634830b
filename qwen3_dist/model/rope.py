"""Rotary position embeddings (arXiv 2104.09864), split halves, with YaRN (arXiv 2309.00071).

Shapes: T = tokens, H = heads, d = head_dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qwen3_dist.config import ModelConfig
from qwen3_dist.ops.transfer import on_device
from qwen3_dist.rope_scaling import RopeScaling


def rope_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Inverse frequencies [d / 2] in fp32 on the CPU, and the factor of cos and sin (1 without YaRN)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequencies = 1.0 / config.rope_base**exponents
    if config.rope_scaling is None:
        return frequencies, 1.0
    return _yarn(
        frequencies, config.rope_base, config.head_dim, config.rope_scaling
    ), config.rope_scaling.mscale


def _yarn(frequencies: Tensor, base: float, head_dim: int, scaling: RopeScaling) -> Tensor:
    """YaRN's "NTK by parts": long wavelengths are stretched by `factor`, short ones kept."""

    def dimension_turning(rotations: float) -> float:
        length = scaling.original_context_length / (rotations * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(base))

    first, last = dimension_turning(scaling.beta_fast), dimension_turning(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    low, high = max(first, 0), min(last, head_dim - 1)
    width = high - low or 0.001
    dimensions = torch.arange(head_dim // 2, dtype=torch.float32, device=frequencies.device)
    stretched = ((dimensions - low) / width).clamp(0, 1)
    return frequencies / scaling.factor * stretched + frequencies * (1 - stretched)


def rope_tables(
    positions: Tensor, frequencies: Tensor, mscale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, d] in `dtype` for integer `positions` [T]. Angles are computed in fp32."""
    angles = positions.float()[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)[:, None, :]
    return (angles.cos() * mscale).to(dtype), (angles.sin() * mscale).to(dtype)


class RopeTables:
    """A cache of `rope_tables` for all positions so far; it grows when a longer position is requested."""

    def __init__(self, config: ModelConfig) -> None:
        # Created on the CPU even if the model is built on the meta device: checkpoints do not contain them.
        self._frequencies, self._mscale = rope_frequencies(config)
        self._cos = self._sin = torch.empty(0, device="cpu")

    def rows(self, positions: Tensor, longest: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [T, 1, d] for `positions` [T], all below `longest`."""
        if len(self._cos) < longest or self._cos.device != positions.device:
            length = max(_FIRST_POSITIONS, 1 << (longest - 1).bit_length())
            everything = torch.arange(length, device=positions.device)
            frequencies = on_device(self._frequencies, torch.float32, positions.device)
            self._cos, self._sin = rope_tables(everything, frequencies, self._mscale, dtype)
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)


_FIRST_POSITIONS = 4096  # least number of positions of the tables
