"""Quantization of weights to int8, fp8 and int4, and weights of the codes of quantised checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_dist.quantization import FP8, INT4, INT8, Grid

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
TILE = 1 << 22  # weights that are made from codes at a time
INT4_GROUP = 128  # inputs of a scale that `as_int4` makes
# The largest weight of a group over each of these is a scale that is tried. With more steps the largest weights are
# cut off, and the others are nearer.
_INT4_STEPS = (7.5, 8.0, 8.5, 9.0)
_INT4_PART = 1 << 10  # groups that are rounded at a time, in memory that caches hold


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


def as_fp8(weight: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Weight fp32 [N, D] -> e4m3 codes [N, D], and the fp32 scale of each block of `rows` x `columns`: the largest
    weight of the block over the largest code, or 1 for a block of zeros. It is no number if a weight is none."""
    outputs, inputs = weight.shape
    padded = F.pad(weight, (0, -inputs % columns, 0, -outputs % rows))
    blocks = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    most = blocks.abs().amax(dim=(1, 3))
    scales = (most / torch.finfo(torch.float8_e4m3fn).max).clamp_(min=torch.finfo(torch.float32).tiny)
    scales = torch.where(most == 0, 1.0, scales)
    codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return codes.view(padded.shape)[:outputs, :inputs], scales


def as_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight fp32 [N, D] -> numbers uint8 [N, D] from 0 to 15, of which 8 is zero, and the scales of groups of 128
    inputs, fp32 [N, ceil(D / 128)] rounded to bf16. Of a few scales, each group gets the one with the least squared
    error."""
    outputs, inputs = weight.shape
    groups = F.pad(weight, (0, -inputs % INT4_GROUP)).view(-1, INT4_GROUP)
    numbers = torch.empty_like(groups, dtype=torch.uint8)
    scales = groups.new_full((len(groups), 1), torch.nan)  # and stays so if numbers are not finite
    parts = zip(*(each.split(_INT4_PART) for each in (groups, numbers, scales)), strict=True)
    near = groups.new_empty(min(_INT4_PART, len(groups)), INT4_GROUP)
    for wide, narrow, best in parts:
        rounded, most = near[: len(wide)], wide.abs().amax(1, keepdim=True).clamp_(min=1e-30)
        least = torch.full_like(most, torch.inf)
        for steps in _INT4_STEPS:
            scale = (most / steps).bfloat16().float()
            _int4_steps(wide, scale, rounded)
            error = rounded.mul_(scale).sub_(wide).square_().sum(1, keepdim=True)
            best.copy_(torch.where(error < least, scale, best))
            least = torch.minimum(error, least)
        narrow.copy_(_int4_steps(wide, best, rounded).add_(8))
    return numbers.view(outputs, -1)[:, :inputs], scales.view(outputs, -1)


def _int4_steps(weight: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    return torch.div(weight, scale, out=out).round_().clamp_(-8, 7)


def row_scales(scale: Tensor, grid: Grid, rows: range) -> Tensor:
    """The scales of these rows of weights [..., N, D], from those of their blocks: [..., rows, blocks of inputs]."""
    first = grid.first_row + rows.start
    blocks = torch.arange(first, first + len(rows), device=scale.device) // grid.rows
    return scale.index_select(-2, blocks)


def dequantized(
    codes: Tensor,
    scale: Tensor,
    grid: Grid,
    rows: range,
    dtype: torch.dtype,
    zero: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Rows of the weight of codes [N, D], or [N, ceil(D / 2)] of 4 bits, and what belongs to them -> [len(rows), D],
    rounded once, to `dtype`. An odd number of inputs of 4 bits gives one more, which is none."""
    wide = _values(codes[rows.start : rows.stop], grid)
    if order is None:
        first = grid.first_column
        blocks = torch.arange(first, first + wide.shape[1], device=scale.device) // grid.columns
        blocks.clamp_(max=scale.shape[-1] - 1)  # of an input that is none
    else:
        blocks = F.pad(order, (0, wide.shape[1] - len(order))).long()
    if zero is not None:
        wide -= row_scales(zero, grid, rows)[:, blocks]
    elif grid.nibbles == INT4:
        wide -= 8
    return wide.mul_(row_scales(scale, grid, rows)[:, blocks]).to(dtype)


def _values(codes: Tensor, grid: Grid) -> Tensor:
    """What codes say, fp32."""
    if grid.nibbles is None:
        return codes.float()
    split = unpacked(codes)
    if grid.nibbles == INT4:
        return split.float()
    return torch.tensor(_E2M1, device=codes.device)[split.int()]


def kind_of(codes: Tensor, grid: Grid) -> str:
    """The kind of codes in memory."""
    return grid.nibbles or (INT8 if codes.dtype == torch.int8 else FP8)


def unpacked(codes: Tensor) -> Tensor:
    """Numbers of 4 bits, of which [..., n] has two in a byte -> [..., 2n] uint8."""
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)


def packed(numbers: Tensor) -> Tensor:
    """Numbers of 4 bits [..., n] uint8 -> [..., ceil(n / 2)], two in a byte, the first in the lower half."""
    pairs = F.pad(numbers, (0, numbers.shape[-1] % 2))
    return pairs[..., ::2] | (pairs[..., 1::2] << 4)


def tiles(codes: Tensor) -> Iterator[range]:
    """The rows of codes [N, D] in parts of at most about `TILE` weights."""
    outputs, inputs = codes.shape
    step = max(1, TILE // max(1, inputs * (2 if codes.dtype == torch.uint8 else 1)))
    return (range(start, min(start + step, outputs)) for start in range(0, outputs, step))


def uniform(scale: Tensor, grid: Grid) -> Tensor | None:
    """The scale of each output [..., N], if blocks are single outputs with all inputs; else None."""
    return scale[..., 0] if grid.rows == 1 and scale.shape[-1] == 1 else None
