"""Paged attention in Triton, with an online softmax (arXiv 2205.14135).

A program computes some query rows of one KV group; a row is a token of one sequence and one of the R heads of the
group. The keys of a decode are split among several programs to fill the GPU, and their results are combined by a
second kernel (Flash-Decoding).

Legend: T tokens, S sequences, H heads, G KV groups (H = G * R), d head_dim, B columns of the block table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3_dist.ops.batch import LayerCache
from qwen3_dist.ops.cuda import compiles
from qwen3_dist.ops.cuda.triton_cache_codes import CODE_UNIT, as_bytes, numbers_of

compiles.count_compilations()

_MOST_SPLITS = 16  # a power of 2
FIXED_ROWS = 16  # query rows of a program in deterministic mode
_KEY_BYTES = (
    128  # keys of a tile times bytes of a number; more does not fit the shared memory of smaller cards
)


# Index tensors may have any alignment, since a step passes slices of them; q, keys and values are aligned.
@triton.jit(
    do_not_specialize=["window", "width", "tokens"],
    do_not_specialize_on_alignment=["tables", "table_rows", "context_lens", "starts"],
)
def _attend(  # type: ignore[no-untyped-def]
    q, keys, values, out, lse, tables, table_rows, context_lens, starts,
    scale, value_scale, window, width, tokens,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr,
    CODES: tl.constexpr,
):  # fmt: skip
    s, g = tl.program_id(0), tl.program_id(1)
    tile, split = tl.program_id(2) // SPLITS, tl.program_id(2) % SPLITS
    R: tl.constexpr = H // G
    first = tl.load(starts + s)
    count = tl.load(starts + s + 1) - first
    length = tl.load(context_lens + s)
    table = tables + tl.load(table_rows + s) * width
    if tile * ROWS >= count * R:
        return
    before = length - count
    rows = tile * ROWS + tl.arange(0, ROWS)
    token = rows // R
    real = token < count
    position = before + token
    dims = tl.arange(0, DIM)
    row_at = (first + token) * H + g * R + rows % R
    within = dims[None, :] < D
    queries = tl.load(q + row_at[:, None] * D + dims[None, :], mask=real[:, None] & within, other=0.0)

    end = tl.minimum(before + (tile * ROWS + ROWS - 1) // R + 1, length)
    begin = tl.where(window > 0, tl.maximum(before + tile * ROWS // R - window + 1, 0), 0)
    begin = begin // KEYS * KEYS  # keys are added up in the same runs whichever query a tile begins with
    span = tl.cdiv(end - begin, SPLITS * KEYS) * KEYS
    low = begin + split * span
    high = tl.minimum(low + span, end)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DIM], tl.float32)
    for key in range(low, high, KEYS):
        at = key + tl.arange(0, KEYS)
        here = at < high
        block = tl.load(table + at // BLOCK_SIZE, mask=here, other=0)
        slot = (block.to(tl.int64) * BLOCK_SIZE + at % BLOCK_SIZE) * G + g
        there = here[:, None] & within
        k = tl.load(keys + slot[:, None] * D + dims[None, :], mask=there, other=0)
        if CODES:
            k = numbers_of(k).to(queries.dtype)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        seen = here[None, :] & (at[None, :] <= position[:, None])
        seen = seen & ((window <= 0) | (at[None, :] > position[:, None] - window))
        scores = tl.where(seen, scores, float("-inf"))
        highest = tl.maximum(most, tl.max(scores, 1))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        shrink = tl.exp(most - base)
        p = tl.exp(scores - base[:, None])
        mass = mass * shrink + tl.sum(p, 1)
        v = tl.load(values + slot[:, None] * D + dims[None, :], mask=there, other=0)
        if CODES:
            v = numbers_of(v).to(queries.dtype)
        sums = sums * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        most = highest
    mass = tl.where(mass > 0, mass, 1.0)
    result = sums / mass[:, None] * value_scale
    into = out + (split * tokens * H + row_at[:, None]) * D + dims[None, :]
    tl.store(into, result.to(out.dtype.element_ty), mask=real[:, None] & within)
    if SPLITS > 1:
        # -inf if no key was visible
        tl.store(lse + split * tokens * H + row_at, most + tl.log(mass), mask=real)


@triton.jit(do_not_specialize=["rows"])
def _weigh(parts, lse, out, rows, D: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Combines the results of the splits of one head, weighted by their parts of the softmax."""
    row = tl.program_id(0)
    at = tl.arange(0, DIM)
    most = tl.load(lse + row)
    for split in range(1, SPLITS):
        most = tl.maximum(most, tl.load(lse + split * rows + row))
    total, sums = 0.0, tl.zeros([DIM], tl.float32)
    for split in range(SPLITS):
        weight = tl.exp(tl.load(lse + split * rows + row) - most)
        total += weight
        sums += weight * tl.load(parts + (split * rows + row) * D + at, mask=at < D, other=0.0)
    tl.store(out + row * D + at, (sums / total).to(out.dtype.element_ty), mask=at < D)


def attention(
    q: Tensor,
    cache: LayerCache,
    tables: Tensor,
    table_rows: Tensor,
    context_lens: Tensor,
    starts: Tensor,
    window: int | None,
    longest: int,
    splits: int = 1,
    fixed_rows: int | None = None,
) -> Tensor:
    """Causal attention of q [T, H, d] over a layer's KV blocks -> [T, H, d].

    Sequence s has rows `starts[s]` to `starts[s + 1]` of q, at most `longest`; `context_lens[s]` tokens including
    these; and its blocks in row `table_rows[s]` of `tables` int32 [rows, B]. The other index tensors are int64. All
    tensors are contiguous. `fixed_rows` are the query rows of a program, by default as many as `longest` suggests.
    """
    (total, heads, dim), (_, block_size, groups, _) = q.shape, cache.keys.shape
    per_group = heads // groups
    rows = fixed_rows or max(16, min(64, triton.next_power_of_2(longest * per_group)))
    tiles = triton.cdiv(longest * per_group, rows)
    out = torch.empty_like(q)
    unit = CODE_UNIT if cache.is_fp8 else 1.0
    scale, value_scale = dim**-0.5 * cache.key_scale * unit, cache.value_scale * unit
    parts = out if splits == 1 else q.new_empty((splits, *q.shape), dtype=torch.float32)
    lse = out if splits == 1 else q.new_empty((splits, total, heads), dtype=torch.float32)
    _attend[(len(context_lens), groups, tiles * splits)](
        q, as_bytes(cache.keys), as_bytes(cache.values), parts, lse, tables, table_rows, context_lens, starts,
        scale, value_scale, window or 0, tables.shape[1], total,
        heads, groups, dim, block_size, rows, _KEY_BYTES // q.element_size(), triton.next_power_of_2(dim), splits,
        cache.is_fp8,
    )  # fmt: skip
    if splits > 1:
        _weigh[(total * heads,)](
            parts, lse, out, total * heads, dim, triton.next_power_of_2(dim), splits, num_warps=1
        )
    return out


def splits_for(sequences: int, groups: int, processors: int) -> int:
    """The number of programs that share the keys of a decode: enough for two programs per multiprocessor of the GPU. A
    power of 2, since the kernel is compiled for each number."""
    wanted = min(_MOST_SPLITS, 2 * processors // max(1, sequences * groups))
    return 1 << max(0, wanted.bit_length() - 1)
