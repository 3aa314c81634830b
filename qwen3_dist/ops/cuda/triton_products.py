"""Grouped matrix products of experts, and products with int8 weights, in Triton.

`torch.nn.functional.grouped_mm` runs without the host for bf16 on some cards only; otherwise it is a loop on the host,
which a CUDA graph cannot hold. torch has no product that reads int8 weights directly. One kernel does both: a tile is
some rows of one expert times some of its columns. Each program finds its tile from the experts' counts on the device,
so the host does not wait, and experts without rows cost nothing.

Legend: R rows, K choices of a row, P = R * K pairs, e experts, D inputs, N outputs, I hidden columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3_dist.ops.cuda import compiles

compiles.count_compilations()

_Three = tuple[Tensor, Tensor, Tensor]


@triton.jit
def _product(a, weights, expert, column, at, inside, N, D, NARROW: tl.constexpr):  # type: ignore[no-untyped-def]
    """a [ROWS, INNER] times a tile of an expert's matrix [N, D] -> [ROWS, COLUMNS]."""
    place = (expert * N + column[None, :]) * D + at[:, None]
    w = tl.load(weights + place, mask=inside, other=0)
    if NARROW:  # there is no direct conversion from int8 to bf16
        w = w.to(tl.float32).to(a.dtype)
    return tl.dot(a, w, input_precision="ieee")


@triton.jit
def place_of_tile(  # type: ignore[no-untyped-def]
    tile, counts, total, EXPERTS: tl.constexpr, WIDE: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr
):
    """Finds tile number `tile` of all experts: its number among the expert's tiles, the expert, the expert's first
    pair and its number of pairs. The expert is EXPERTS if there are fewer tiles."""
    if EXPERTS == 1 and SHARE == 0:  # a product of all rows with one matrix
        expert, first, count = 0, 0, total
    else:
        each = tl.arange(0, WIDE)
        all_counts = tl.load(counts + 1 + each, mask=each < EXPERTS, other=0)
        tiles = (all_counts + ROWS - 1) // ROWS
        expert = tl.minimum(tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0), EXPERTS)
        before = each < expert
        first = tl.load(counts) + tl.sum(tl.where(before, all_counts, 0), 0)
        count = tl.sum(tl.where(each == expert, all_counts, 0), 0)
        tile -= tl.sum(tl.where(before, tiles, 0), 0)
    return tile, expert, first, count


@triton.jit
def rows_of_tile(  # type: ignore[no-untyped-def]
    tile, first, count, order, SHARE: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr
):
    """Which rows of a tile exist, and where each is read and written, as `_grouped` says."""
    row = tile * ROWS + tl.arange(0, ROWS)
    real = row < count
    pair = (first + row).to(tl.int64)
    source, target = pair, pair
    if SHARE > 0:
        target = tl.load(order + pair, mask=real, other=0)
    if GATED:
        source, target = target // SHARE, pair
    return real, source, target


@triton.jit
def gated(gate, up):  # type: ignore[no-untyped-def]
    """silu(gate) * up, rounded as separate kernels round."""
    narrow = gate.dtype
    wide = gate.to(tl.float32)
    silu = (wide / (1 + tl.exp(-wide))).to(narrow).to(tl.float32)
    return (silu * up.to(tl.float32)).to(narrow)


@triton.jit(do_not_specialize=["total"])
def _grouped(  # type: ignore[no-untyped-def]
    x, weights, other, scale, other_scale, order, counts, out, total, N, D,
    EXPERTS: tl.constexpr, WIDE: tl.constexpr, SHARE: tl.constexpr, GATED: tl.constexpr, SCALED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Computes one tile: some pairs of one expert times some columns. `order` has the pairs sorted by expert, `counts`
    the number of pairs of each expert, from id -1 on.

    GATED: silu(fc1) * fc2 of the rows of x; a row has SHARE pairs, and the outputs are in sorted order.
    Not GATED: one matrix product; inputs are in sorted order, outputs in the original order of the pairs.
    SHARE = 0: a product of all `total` rows with one matrix.
    """
    tile, expert, first, count = place_of_tile(tl.program_id(0), counts, total, EXPERTS, WIDE, SHARE, ROWS)
    if expert >= EXPERTS:
        return
    real, source, target = rows_of_tile(tile, first, count, order, SHARE, GATED, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    expert = tl.zeros([1], tl.int64) + expert
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    others = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(0, D, INNER):
        at = begin + tl.arange(0, INNER)
        a = tl.load(x + source[:, None] * D + at[None, :], mask=real[:, None] & (at < D)[None, :], other=0.0)
        inside = (at < D)[:, None] & (column < N)[None, :]
        sums += _product(a, weights, expert, column, at, inside, N, D, SCALED)
        if GATED:
            others += _product(a, other, expert, column, at, inside, N, D, SCALED)
    narrow = out.dtype.element_ty
    if SCALED:
        sums *= tl.load(scale + expert * N + column, mask=column < N, other=0.0)[None, :]
    result = sums.to(narrow)
    if GATED:
        if SCALED:
            others *= tl.load(other_scale + expert * N + column, mask=column < N, other=0.0)[None, :]
        result = gated(result, others.to(narrow))
    tl.store(out + target[:, None] * N + column[None, :], result, mask=real[:, None] & (column < N)[None, :])


@triton.jit(do_not_specialize_on_alignment=["ids", "weights"])
def _summed(answers, ids, weights, out, D, K: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros([COLUMNS], tl.float32)
    for k in range(K):
        pair = row * K + k
        if tl.load(ids + pair) >= 0:
            answer = tl.load(answers + pair * D + at, mask=at < D, other=0.0).to(tl.float32)
            sums += answer * tl.load(weights + pair)
    tl.store(out + row * D + at, sums.to(out.dtype.element_ty), mask=at < D)


@triton.jit(do_not_specialize=["P"], do_not_specialize_on_alignment=["ids"])
def _order(ids, counts, totals, order, P, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Finds the pairs of one id and writes them to their place in `order`, a stable sort by id. Adds their number to
    `totals`."""
    mine = tl.program_id(0) - 1
    at = tl.arange(0, BLOCK)
    smaller = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, P, BLOCK):
        asked = tl.load(ids + begin + at, mask=begin + at < P, other=mine)
        smaller += (asked < mine).to(tl.int32)
    first = tl.sum(smaller, 0)
    count = 0
    for begin in range(0, P, BLOCK):
        is_mine = (begin + at < P) & (tl.load(ids + begin + at, mask=begin + at < P, other=-2) == mine)
        place = first + count + tl.cumsum(is_mine.to(tl.int32), 0) - 1
        tl.store(order + place, (begin + at).to(tl.int64), mask=is_mine)
        count += tl.sum(is_mine.to(tl.int32), 0)
    tl.store(counts + mine + 1, count)
    tl.store(totals + mine + 1, tl.load(totals + mine + 1) + count)


def experts(
    x: Tensor, stacks: _Three, scales: _Three | None, ids: Tensor, weights: Tensor, totals: Tensor
) -> Tensor:
    """Sum over the K choices of weight * expert(x) -> [R, D].

    x [R, D] contiguous; stacks fc1 and fc2 [e, I, D] and fc3 [e, D, I] of x's dtype, or int8 with fp32 scales [e, I],
    [e, I] and [e, D]; ids int64 [R, K], -1 for none; weights fp32 [R, K]. Adds the number of occurrences of each id,
    from -1 on, to `totals` [1 + e] int64.
    """
    dim, choices, columns = x.shape[1], ids.shape[1], stacks[0].shape[1]
    pairs = ids.numel()
    if not pairs:
        return torch.zeros_like(x)
    order, counts = sorted_pairs(ids, totals)
    hidden, answers = x.new_empty(pairs, columns), x.new_empty(pairs, dim)
    one, two, three = scales or (None, None, None)
    _launch(x, (stacks[0], stacks[1]), (one, two), order, counts, hidden, choices)
    _launch(hidden, (stacks[2], None), (three, None), order, counts, answers, choices)
    return summed(answers, ids, weights)


def sorted_pairs(ids: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    """The indices int64 [P] that sort ids [P] stably, and the number of occurrences of each id, from -1 on, int32
    [1 + e]. Adds these to `totals` [1 + e] int64."""
    order, counts = ids.new_empty(ids.numel()), ids.new_empty(len(totals), dtype=torch.int32)
    _order[(len(totals),)](ids, counts, totals, order, ids.numel(), 1024)
    return order, counts


def expert_hidden(x: Tensor, stacks: _Three, scales: _Three | None, ids: Tensor, totals: Tensor) -> Tensor:
    """silu(fc1 x) * fc2 x by each row's expert -> [P, I], with the tile of deterministic mode. x [P, D] contiguous,
    ids int64 [P], -1 for none, whose rows are arbitrary. The others as in `experts`."""
    out = x.new_empty(len(x), stacks[0].shape[1])
    if not len(x):
        return out
    order, counts = sorted_pairs(ids, totals)
    by_expert, (one, two, _) = torch.empty_like(out), scales or (None, None, None)
    _launch(x, stacks[:2], (one, two), order, counts, by_expert, 1, FIXED_TILE)
    out[order] = by_expert
    return out


def expert_outputs(hidden: Tensor, stack: Tensor, scale: Tensor | None, ids: Tensor) -> Tensor:
    """fc3 hidden by each row's expert -> [P, N], with the tile of deterministic mode. hidden [P, I] contiguous,
    `stack` [e, N, I] with fp32 `scale` [e, N] if it is int8, ids int64 [P], -1 for none, whose rows are arbitrary."""
    out = hidden.new_empty(len(hidden), stack.shape[1])
    if len(hidden):
        order, counts = sorted_pairs(ids, ids.new_zeros(1 + len(stack)))
        _launch(hidden[order], (stack, None), (scale, None), order, counts, out, 1, FIXED_TILE)
    return out


def fixed_linear(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """x [R, D], contiguous, times `weight` [N, D], int8 with fp32 `scale` [N] or of x's dtype -> [R, N], with the tile
    of deterministic mode."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    if len(x):
        _launch(x, (weight[None], None), (scale, None), None, None, out, 0, FIXED_TILE)
    return out


def summed(answers: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Sum over the K choices of weight * answer -> [R, D]. answers [P, D], ids and weights [R, K], all contiguous.
    Answers whose id is -1 are not read."""
    (rows, choices), dim = ids.shape, answers.shape[1]
    out = answers.new_empty(rows, dim)
    if rows:
        _summed[(rows, triton.cdiv(dim, 512))](answers, ids, weights, out, dim, choices, 512)
    return out


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [R, D], contiguous, times int8 `weight` [N, D] with fp32 `scale` [N] of each output -> [R, N]."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    if len(x):
        _launch(x, (weight[None], None), (scale, None), None, None, out, 0)
    return out


def _launch(
    x: Tensor,
    stacks: tuple[Tensor, Tensor | None],
    scales: tuple[Tensor | None, Tensor | None],
    order: Tensor | None,
    counts: Tensor | None,
    out: Tensor,
    share: int,
    tile: tuple[int, int] | None = None,
) -> None:
    (weights, other), (scale, other_scale) = stacks, scales
    (num_experts, outputs, inner), pairs = weights.shape, len(out)
    rows, columns = tile or _tile(pairs, num_experts, outputs)
    grid = (min(pairs, triton.cdiv(pairs, rows) + num_experts - 1), triton.cdiv(outputs, columns))
    _grouped[grid](
        x, weights, other, scale, other_scale, order, counts, out, pairs, outputs, inner,
        num_experts, max(2, triton.next_power_of_2(num_experts)), share, other is not None, scale is not None,
        rows, columns, 128 if weights.element_size() == 1 else 128 // weights.element_size(),
        num_warps=4, num_stages=3,
    )  # fmt: skip


# Rows and columns of each tile in deterministic mode. A card's instructions for a tile depend on its size, and the
# order of sums depends on the instructions.
FIXED_TILE = (64, 64)
_PROGRAMS = 256  # about two for each multiprocessor of a card


def _tile(pairs: int, num_experts: int, outputs: int) -> tuple[int, int]:
    """Rows and columns of a tile. They depend on `pairs` only through its next power of 2, so that warm-up with powers
    of 2 compiles all variants."""
    most = triton.next_power_of_2(pairs)
    rows = 16 if most <= 32 * num_experts else 64
    tiles = min(most, triton.cdiv(most, rows) + num_experts - 1)
    return rows, 64 if tiles * outputs >= 64 * _PROGRAMS else 32
