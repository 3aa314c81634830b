"""Sampling in Triton: one kernel instead of thirty in plain torch.

Logits are fp32 or narrower, with contiguous rows. Legend: L rows, V vocab_size, C candidates of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3_dist.ops.cuda import compiles

compiles.count_compilations()

# Candidates that a program reads at once: a constant, so that a row's sums do not depend on the batch.
_BLOCK = 1024


@triton.jit
def _order(logits, keys, stride, V, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logit = tl.load(logits + row * stride + token, mask=token < V, other=0.0).to(tl.float32)
    bits = logit.to(tl.int32, bitcast=True)
    bits ^= (bits >> 31) & 0x7FFFFFFF  # integers in the order of the floats
    tl.store(keys + row * V + token, (bits.to(tl.int64) << 32) + (V - 1 - token), mask=token < V)


def ordering_keys(logits: Tensor) -> Tensor:
    """Sort keys int64 [L, V]: larger for larger logits [L, V], and for equal logits larger for smaller token ids."""
    rows, vocab_size = logits.shape
    keys = logits.new_empty(rows, vocab_size, dtype=torch.int64)
    _order[(rows, triton.cdiv(vocab_size, _BLOCK))](logits, keys, logits.stride(0), vocab_size, _BLOCK)
    return keys


@triton.jit
def _logits(candidates, at, end, ORDERED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The logits in fp32, -inf from `end` on."""
    read = tl.load(candidates + at, mask=at < end, other=0)
    if ORDERED:
        bits = (read >> 32).to(tl.int32)
        logits = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    else:
        logits = read.to(tl.float32)
    return tl.where(at < end, logits, float("-inf"))


@triton.jit
def _weights(candidates, at, end, largest, temperature, ORDERED: tl.constexpr):  # type: ignore[no-untyped-def]
    """exp((logit - largest) / temperature) of the candidates before `end`, in fp64; 0 from `end` on."""
    return tl.exp((_logits(candidates, at, end, ORDERED) - largest) / temperature).to(tl.float64)


# C and stride equal the largest top-k of the step, so the kernel is not specialized on them.
@triton.jit(do_not_specialize=["C", "stride"], do_not_specialize_on_alignment=["settings"])
def _draw(  # type: ignore[no-untyped-def]
    candidates, settings, out, stride, C, V, ORDERED: tl.constexpr, BLOCK: tl.constexpr
):
    """Samples one row: computes the weight of the top-k candidates, cuts them by top-p, then finds the sampled one."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    temperature = tl.maximum(tl.load(settings + row).to(tl.float32), 1.1754944e-38)
    end = tl.minimum(tl.load(settings + rows + row), C).to(tl.int32)
    top_p, uniform = tl.load(settings + 2 * rows + row), tl.load(settings + 3 * rows + row)
    source = candidates + row * stride
    each = tl.arange(0, BLOCK)
    largest = tl.max(_logits(source, each, end, ORDERED), 0)
    if not ORDERED:
        for begin in range(BLOCK, end, BLOCK):
            largest = tl.maximum(largest, tl.max(_logits(source, begin + each, end, False), 0))
    first = tl.sum(_weights(source, each, end, largest, temperature, ORDERED), 0)
    total = first
    for begin in range(BLOCK, end, BLOCK):
        total += tl.sum(_weights(source, begin + each, end, largest, temperature, ORDERED), 0)

    if ORDERED:  # keeps the fewest candidates that reach top-p
        reached = top_p * total
        begin, before, here = 0, first * 0, first
        while (before + here < reached) & (begin + BLOCK < end):
            begin += BLOCK
            before += here
            here = tl.sum(_weights(source, begin + each, end, largest, temperature, True), 0)
        weights = _weights(source, begin + each, end, largest, temperature, True)
        kept = (before + tl.cumsum(weights, 0) - weights < reached) | (begin + each == 0)
        end = tl.minimum(end, begin + tl.sum(kept.to(tl.int32), 0))
        total = before + tl.sum(tl.where(begin + each < end, weights, 0.0), 0)

    drawn = tl.minimum(uniform, 1 - 2.220446049250313e-16) * total  # below the total even after rounding
    begin, before = 0, first * 0
    here = tl.sum(_weights(source, each, end, largest, temperature, ORDERED), 0)
    while (before + here <= drawn) & (begin + BLOCK < end):
        begin += BLOCK
        before += here
        here = tl.sum(_weights(source, begin + each, end, largest, temperature, ORDERED), 0)
    weights = _weights(source, begin + each, end, largest, temperature, ORDERED)
    passed = tl.sum((before + tl.cumsum(weights, 0) <= drawn).to(tl.int32), 0)
    place = begin + tl.minimum(passed, tl.max(tl.where(weights > 0, each, 0), 0))
    token = place.to(tl.int64)
    if ORDERED:
        token = V - 1 - (tl.load(source + place) & 0xFFFFFFFF)
    tl.store(out + row, token)


@triton.jit
def _log_softmax(logits, out, V, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    each = tl.arange(0, BLOCK)
    source = logits + row * V
    largest = tl.max(_logits(source, each, V, False), 0)
    for begin in range(BLOCK, V, BLOCK):
        largest = tl.maximum(largest, tl.max(_logits(source, begin + each, V, False), 0))
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, V, BLOCK):
        total += tl.exp(_logits(source, begin + each, V, False) - largest)
    shift = largest + tl.log(tl.sum(total, 0))
    for begin in range(0, V, BLOCK):
        at = begin + each
        tl.store(out + row * V + at, _logits(source, at, V, False) - shift, mask=at < V)


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities fp32 [L, V] of logits [L, V], contiguous. One program adds up a row."""
    out = logits.new_empty(logits.shape, dtype=torch.float32)
    _log_softmax[(len(logits),)](logits, out, logits.shape[1], _BLOCK)
    return out


def draw_from_ordered(keys: Tensor, vocab_size: int, settings: Tensor) -> Tensor:
    """Samples token ids int64 [L] from the likeliest tokens, given as `ordering_keys` [L, C], largest first.

    `settings` are fp64 [4, L, 1]: temperature, top-k (V or more for all), top-p and a uniform number in [0, 1).
    """
    return _drawn(keys, vocab_size, settings, ordered=True)


def draw_from_all(logits: Tensor, settings: Tensor) -> Tensor:
    """Samples token ids int64 [L] from logits [L, V] in order of token ids. top-k and top-p are ignored."""
    return _drawn(logits, logits.shape[1], settings, ordered=False)


def _drawn(candidates: Tensor, vocab_size: int, settings: Tensor, ordered: bool) -> Tensor:
    rows, count = candidates.shape
    out = candidates.new_empty(rows, dtype=torch.int64)
    _draw[(rows,)](candidates, settings, out, candidates.stride(0), count, vocab_size, ordered, _BLOCK)
    return out
