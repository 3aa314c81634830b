"""Products with the codes of quantised checkpoints, dense and for experts, in Triton.

A program reads codes and scales of a tile of weights, makes the weights in registers and multiplies at once, so no
weight of the activations' dtype is ever in the card's memory. A weight is (code - zero) * scale, rounded once to the
activations' dtype, as `quantize.dequantized` makes it; sums are fp32.

Legend: R rows, P pairs of a row and an expert, e experts, D inputs, N outputs, I hidden columns.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3_dist.ops.base import ExpertWeights, Matrix
from qwen3_dist.ops.cuda.triton_products import (
    FIXED_TILE,
    gated,
    place_of_tile,
    rows_of_tile,
    sorted_pairs,
    summed,
)
from qwen3_dist.ops.quantize import kind_of
from qwen3_dist.quantization import FP4, FP8, INT4, INT8

# How a kernel reads codes. The first two are two in a byte.
_INT4, _FP4, _INT8, _FP8, _FP8_BITS = (tl.constexpr(number) for number in range(5))


@triton.jit
def _values(codes, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """What codes say, fp32. Floats of few bits become fp16 by moving their bits; their exponents then differ by a
    constant."""
    if KIND == _FP8:
        values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    elif KIND == _FP8_BITS:
        bits = (codes.to(tl.int16) << 7) & -16385  # without bit 14, where the sign is again
        values = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256
        values = tl.where((codes & 127) == 127, float("nan"), values)
    elif KIND == _FP4:
        wide = codes.to(tl.int16)
        bits = ((wide & 8) << 12) | ((wide & 7) << 9)
        values = bits.to(tl.float16, bitcast=True).to(tl.float32) * 16384
    else:
        values = codes.to(tl.float32)
    return values


@triton.jit
def _weights(  # type: ignore[no-untyped-def]
    codes, scales, zeros, groups, expert, column, begin, N, D, SPAN, HIGH, WIDE,
    KIND: tl.constexpr, ROWS_OF_BLOCK: tl.constexpr, COLUMNS_OF_BLOCK: tl.constexpr, FIRST_ROW: tl.constexpr,
    FIRST_COLUMN: tl.constexpr, SAME: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Weights [INNER, COLUMNS] from input `begin` on, fp32. `codes` are [e, N, SPAN], `scales` and `zeros` [e, HIGH,
    WIDE], `groups` [e, D]. SAME inputs at a time, from `begin` on, have the same scale."""
    PARTS: tl.constexpr = INNER // SAME
    PACKED: tl.constexpr = KIND <= _FP4
    EACH: tl.constexpr = 2 if PACKED else 1  # inputs in a byte
    real = (column < N)[None, :]
    at = begin // EACH + tl.arange(0, INNER // EACH)
    inside = real & ((at >= 0) & (at < SPAN))[:, None]
    stored = tl.load(codes + (expert * N + column[None, :]) * SPAN + at[:, None], mask=inside, other=0)
    if PACKED:
        stored = tl.join(stored & 15, stored >> 4).permute(0, 2, 1).reshape(INNER, COLUMNS)
    values = _values(stored, KIND)
    first = begin + tl.arange(0, PARTS) * SAME  # of each part
    if groups is not None:
        block = tl.load(groups + expert * D + first, mask=first < D, other=0)
    else:
        block = (FIRST_COLUMN + first) // COLUMNS_OF_BLOCK
    row = (FIRST_ROW + column) // ROWS_OF_BLOCK
    place = (expert * HIGH + row[None, :]) * WIDE + block[:, None]
    known = real & (block < WIDE)[:, None]
    parts = values.reshape(PARTS, SAME, COLUMNS)
    if zeros is not None:
        parts -= tl.load(zeros + place, mask=known, other=0).to(tl.float32)[:, None, :]
    elif KIND == _INT4:
        parts -= 8.0
    parts *= tl.load(scales + place, mask=known, other=0.0)[:, None, :]
    return parts.reshape(INNER, COLUMNS)


@triton.jit(do_not_specialize=["total"])
def _coded(  # type: ignore[no-untyped-def]
    x, codes, scales, zeros, groups, others, other_scales, other_zeros, other_groups, order, counts, out,
    total, N, D, SPAN, HIGH, WIDE,
    KIND: tl.constexpr, ROWS_OF_BLOCK: tl.constexpr, COLUMNS_OF_BLOCK: tl.constexpr, FIRST_ROW: tl.constexpr,
    FIRST_COLUMN: tl.constexpr, SAME: tl.constexpr,
    EXPERTS: tl.constexpr, SPREAD: tl.constexpr, SHARE: tl.constexpr, GATED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Computes one tile, as `triton_products._grouped` does, with the weights of codes."""
    tile, expert, first, count = place_of_tile(tl.program_id(0), counts, total, EXPERTS, SPREAD, SHARE, ROWS)
    if expert >= EXPERTS:
        return
    real, source, target = rows_of_tile(tile, first, count, order, SHARE, GATED, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    expert = tl.zeros([1], tl.int64) + expert
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    other_sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    # A tile begins with a block, or SAME inputs after another beginning.
    for begin in range(-(FIRST_COLUMN % SAME), D, INNER):
        at = begin + tl.arange(0, INNER)
        known = (at >= 0) & (at < D)
        a = tl.load(x + source[:, None] * D + at[None, :], mask=real[:, None] & known[None, :], other=0.0)
        w = _weights(
            codes, scales, zeros, groups, expert, column, begin, N, D, SPAN, HIGH, WIDE, KIND, ROWS_OF_BLOCK,
            COLUMNS_OF_BLOCK, FIRST_ROW, FIRST_COLUMN, SAME, COLUMNS, INNER,
        )  # fmt: skip
        sums = tl.dot(a, w.to(a.dtype), sums, input_precision="ieee")
        if GATED:
            w = _weights(
                others, other_scales, other_zeros, other_groups, expert, column, begin, N, D, SPAN, HIGH, WIDE, KIND,
                ROWS_OF_BLOCK, COLUMNS_OF_BLOCK, FIRST_ROW, FIRST_COLUMN, SAME, COLUMNS, INNER,
            )  # fmt: skip
            other_sums = tl.dot(a, w.to(a.dtype), other_sums, input_precision="ieee")
    result = sums.to(out.dtype.element_ty)
    if GATED:
        result = gated(result, other_sums.to(out.dtype.element_ty))
    tl.store(out + target[:, None] * N + column[None, :], result, mask=real[:, None] & (column < N)[None, :])


class Tile(NamedTuple):
    """The rows, outputs and inputs that a program multiplies at a time, and how Triton runs it."""

    rows: int
    columns: int
    inner: int
    warps: int = 4
    stages: int = 3


def linear_codes(x: Tensor, part: Matrix, tile: Tile | None = None) -> Tensor:
    """x [R, D], contiguous, times the weight of `part`, which has a grid and no bias -> [R, N]."""
    out = x.new_empty(len(x), part.outputs)
    if len(x):
        stack = part._replace(
            weight=part.weight[None],
            scale=part.scale[None] if part.scale is not None else None,
            zero=part.zero[None] if part.zero is not None else None,
            order=part.order[None] if part.order is not None else None,
        )
        _launch(x, stack, None, None, None, out, 0, tile)
    return out


def fixed_linear_codes(x: Tensor, part: Matrix) -> Tensor:
    """`linear_codes` with the tile of deterministic mode."""
    return linear_codes(x, part, _FIXED)


def experts_of_codes(
    x: Tensor, weights: ExpertWeights, ids: Tensor, routing: Tensor, totals: Tensor
) -> Tensor:
    """`triton_products.experts` with stacks of codes."""
    pairs, choices = ids.numel(), ids.shape[1]
    if not pairs:
        return torch.zeros_like(x)
    fc1, fc2, fc3 = _stacks(weights)
    order, counts = sorted_pairs(ids, totals)
    hidden, answers = x.new_empty(pairs, fc1.outputs), x.new_empty(pairs, fc3.outputs)
    _launch(x, fc1, fc2, order, counts, hidden, choices)
    _launch(hidden, fc3, None, order, counts, answers, choices)
    return summed(answers, ids, routing)


def hidden_of_codes(x: Tensor, weights: ExpertWeights, ids: Tensor, totals: Tensor) -> Tensor:
    """`triton_products.expert_hidden` with stacks of codes."""
    fc1, fc2, _ = _stacks(weights)
    out = x.new_empty(len(x), fc1.outputs)
    if len(x):
        order, counts = sorted_pairs(ids, totals)
        by_expert = torch.empty_like(out)
        _launch(x, fc1, fc2, order, counts, by_expert, 1, _FIXED)
        out[order] = by_expert
    return out


def outputs_of_codes(hidden: Tensor, weights: ExpertWeights, ids: Tensor) -> Tensor:
    """`triton_products.expert_outputs` with stacks of codes."""
    fc3 = _stacks(weights)[2]
    out = hidden.new_empty(len(hidden), fc3.outputs)
    if len(hidden):
        order, counts = sorted_pairs(ids, ids.new_zeros(1 + len(fc3.weight)))
        _launch(hidden[order], fc3, None, order, counts, out, 1, _FIXED)
    return out


def _stacks(weights: ExpertWeights) -> tuple[Matrix, Matrix, Matrix]:
    """fc1, fc2 and fc3 of all experts: matrices whose tensors have one more dimension, the expert."""
    none = (None,) * 3
    one, two, three = (
        Matrix(codes, codes.shape[1], scale, None, grid, zero, order)
        for codes, scale, grid, zero, order in zip(
            weights.stacks,
            weights.scales or none,
            weights.grids or none,
            weights.zeros or none,
            weights.orders or none,
            strict=True,
        )
    )
    return one, two, three


def _launch(
    x: Tensor,
    stack: Matrix,
    other: Matrix | None,
    order: Tensor | None,
    counts: Tensor | None,
    out: Tensor,
    share: int,
    tile: Tile | None = None,
) -> None:
    """Starts the kernel for the matrices `stack` of all experts, whose tensors have one more dimension."""
    grid, scale = stack.grid, stack.scale
    assert grid is not None and scale is not None
    (num_experts, outputs, span), pairs, inner = stack.weight.shape, len(out), x.shape[1]
    rows, columns, at_once, warps, stages = tile or _tile(pairs, num_experts, outputs, other is not None)
    if x.dtype == torch.float32:
        at_once //= 2
    kind, same = _kind(stack, x.device), _same(stack, at_once)
    programs = (min(pairs, triton.cdiv(pairs, rows) + num_experts - 1), triton.cdiv(outputs, columns))
    second = other or Matrix(None, 0)  # type: ignore[arg-type]
    _coded[programs](
        x, _bytes(stack.weight), scale, stack.zero, stack.order,
        None if other is None else _bytes(second.weight), second.scale, second.zero, second.order,
        order, counts, out, pairs, outputs, inner, span, *scale.shape[1:],
        kind, grid.rows, grid.columns, grid.first_row, 0 if stack.order is not None else grid.first_column, same,
        num_experts, max(2, triton.next_power_of_2(num_experts)), share, other is not None,
        rows, columns, at_once, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _bytes(codes: Tensor) -> Tensor:
    """Codes as a kernel takes them on every card."""
    return codes.view(torch.int8) if codes.dtype == torch.float8_e4m3fn else codes


def _kind(stack: Matrix, device: torch.device) -> int:
    assert stack.grid is not None
    kind = kind_of(stack.weight, stack.grid)
    if kind == FP8:
        return int(_FP8.value if has_fp8(device) else _FP8_BITS.value)
    return int({INT8: _INT8, INT4: _INT4, FP4: _FP4}[kind].value)


@functools.cache
def has_fp8(device: torch.device) -> bool:
    """Whether a card converts e4m3 by itself; Triton refuses the type on others."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _same(stack: Matrix, at_once: int) -> int:
    """The most inputs, a power of two, that begin with a block or in one and have the same scale."""
    grid = stack.grid
    assert grid is not None
    if stack.order is not None:
        return 1
    same = min(at_once, grid.columns & -grid.columns)
    # A tile begins as many inputs before the first as its block is cut by; codes of 4 bits begin with a byte.
    return 1 if grid.nibbles and grid.first_column % same % 2 else same


_FIXED = Tile(*FIXED_TILE, inner=64)
_PROGRAMS = 256  # about two for each multiprocessor of a card


def _tile(pairs: int, num_experts: int, outputs: int, two: bool) -> Tile:
    """The tile for a product, or for `two` at once. It depends on `pairs` only through its next power of 2, so that
    warm-up with powers of 2 compiles all variants."""
    most = triton.next_power_of_2(pairs)
    if most > 256 * num_experts:
        return Tile(128, 64, 64, warps=8) if two else Tile(128, 128, 64, warps=8)
    rows = 16 if most <= 16 * num_experts else 64
    tiles = min(most, triton.cdiv(most, rows) + num_experts - 1)
    columns = next(
        (width for width in (64, 32) if tiles * outputs >= width * _PROGRAMS), 16 if rows == 16 else 32
    )
    return Tile(16, columns, 128, stages=4) if rows == 16 else Tile(64, columns, 64)
