"""Operations on rows in Triton: norm, RoPE, SwiGLU and routing, one kernel each instead of a dozen in plain torch.

All round to the rows' dtype in the same places as plain torch. Legend: T tokens or rows, D numbers of a row, H heads,
G KV groups, d head_dim, I hidden columns, E experts, K choices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3_dist.ops.batch import LayerCache
from qwen3_dist.ops.cuda import compiles
from qwen3_dist.ops.cuda.triton_cache_codes import as_bytes, codes_of

compiles.count_compilations()

_COLUMNS = 1024  # columns of a program of `swiglu`


@triton.jit
def _norm(x, scale, out, eps, D: tl.constexpr, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, DIM)
    here = at < D
    wide = tl.load(x + row * D + at, mask=here, other=0.0).to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
    normed = normed.to(out.dtype.element_ty).to(tl.float32)
    scaled = normed * tl.load(scale + at, mask=here, other=0.0).to(tl.float32)
    tl.store(out + row * D + at, scaled.to(out.dtype.element_ty), mask=here)


def norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """RMSNorm of contiguous x [..., D] by `scale` [D], with Qwen3's order of rounding."""
    out, dim = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // dim
    if rows:
        width = triton.next_power_of_2(dim)
        _norm[(rows,)](x, scale, out, eps, dim, width, num_warps=max(1, min(8, width // 256)))
    return out


@triton.jit
def _keep(into, x, by, here, CODES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Stores numbers, or the codes of `by` times these."""
    if CODES:
        tl.store(into, codes_of(x.to(tl.float32) * by), mask=here)
    else:
        tl.store(into, x, mask=here)


@triton.jit
def _norm_and_rotate(  # type: ignore[no-untyped-def]
    source, scale, cos, sin, into, by, eps,
    D: tl.constexpr, HALF: tl.constexpr, NORMS: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """Applies norm and RoPE to the d numbers of one head and stores them."""
    low = tl.arange(0, HALF)
    here, high = low < D // 2, low + D // 2
    narrow = source.dtype.element_ty
    first = tl.load(source + low, mask=here, other=0.0).to(tl.float32)
    second = tl.load(source + high, mask=here, other=0.0).to(tl.float32)
    if NORMS:
        shrink = tl.rsqrt((tl.sum(first * first, 0) + tl.sum(second * second, 0)) / D + eps)
        first = (first * shrink).to(narrow).to(tl.float32)
        second = (second * shrink).to(narrow).to(tl.float32)
        first = (first * tl.load(scale + low, mask=here, other=0.0).to(tl.float32)).to(narrow).to(tl.float32)
        second = (
            (second * tl.load(scale + high, mask=here, other=0.0).to(tl.float32)).to(narrow).to(tl.float32)
        )
    c = tl.load(cos + low, mask=here, other=0.0).to(tl.float32)  # the same for both halves
    s = tl.load(sin + low, mask=here, other=0.0).to(tl.float32)
    new_first = (first * c).to(narrow).to(tl.float32) - (second * s).to(narrow).to(tl.float32)
    new_second = (second * c).to(narrow).to(tl.float32) + (first * s).to(narrow).to(tl.float32)
    _keep(into + low, new_first.to(narrow), by, here, CODES)
    _keep(into + high, new_second.to(narrow), by, here, CODES)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _rotate(  # type: ignore[no-untyped-def]
    q, k, v, out, keys, values, q_scale, k_scale, cos, sin, slots, key_by, value_by, eps, q_stride, k_stride, v_stride,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, NORMS: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cos += token * D
    sin += token * D
    if head < H:
        source, into = q + token * q_stride + head * D, out + (token * H + head) * D
        _norm_and_rotate(source, q_scale, cos, sin, into, 1.0, eps, D, HALF, NORMS, False)
    else:
        group = head - H
        place = (tl.load(slots + token) * G + group) * D
        source = k + token * k_stride + group * D
        _norm_and_rotate(source, k_scale, cos, sin, keys + place, key_by, eps, D, HALF, NORMS, CODES)
        at = tl.arange(0, 2 * HALF)
        value = tl.load(v + token * v_stride + group * D + at, mask=at < D)
        _keep(values + place + at, value, value_by, at < D, CODES)


def rotate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: LayerCache,
    scales: tuple[Tensor, Tensor] | None,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    eps: float,
) -> Tensor:
    """Applies RMSNorm (`scales` of q and k, None for no norm) and RoPE to q [T, H, d] and k [T, G, d]. Writes k and v
    [T, G, d] to their `slots` [T] of the cache. Returns q as a new tensor.

    The heads of a token are contiguous, tokens need not be. cos and sin are [T, 1, d]."""
    (tokens, heads, dim), groups = q.shape, k.shape[1]
    out = q.new_empty(q.shape)
    if tokens:
        q_scale, k_scale = scales or (cos, cos)  # without norms the kernel does not read the scales
        _rotate[(tokens, heads + groups)](
            q, k, v, out, as_bytes(cache.keys), as_bytes(cache.values), q_scale, k_scale, cos, sin, slots,
            1 / cache.key_scale, 1 / cache.value_scale, eps, q.stride(0), k.stride(0), v.stride(0),
            heads, groups, dim, triton.next_power_of_2(dim) // 2, scales is not None, cache.is_fp8, num_warps=1,
        )  # fmt: skip
    return out


@triton.jit
def _swiglu(gate, up, out, gate_stride, up_stride, I: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: E741
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = at < I
    wide = tl.load(gate + row * gate_stride + at, mask=here, other=0.0).to(tl.float32)
    silu = (wide / (1 + tl.exp(-wide))).to(out.dtype.element_ty).to(tl.float32)
    hidden = silu * tl.load(up + row * up_stride + at, mask=here, other=0.0).to(tl.float32)
    tl.store(out + row * I + at, hidden.to(out.dtype.element_ty), mask=here)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both [T, I] with contiguous rows -> [T, I]."""
    rows, columns = gate.shape
    out = gate.new_empty(rows, columns)
    if rows:
        blocks = triton.cdiv(columns, _COLUMNS)
        _swiglu[(rows, blocks)](gate, up, out, gate.stride(0), up.stride(0), columns, _COLUMNS)
    return out


@triton.jit
def _route(  # type: ignore[no-untyped-def]
    logits, ids, weights, E: tl.constexpr, WIDE: tl.constexpr, K: tl.constexpr, K_WIDE: tl.constexpr,
    NORMED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at, k_at = tl.arange(0, WIDE), tl.arange(0, K_WIDE)
    wide = tl.load(logits + row * E + at, mask=at < E, other=float("-inf")).to(tl.float32)
    shares = tl.exp(wide - tl.max(wide, 0))
    left = tl.where(at < E, shares / tl.sum(shares, 0), -1.0)
    chosen, total = tl.zeros([K_WIDE], tl.float32), 0.0
    for k in range(K):
        best = tl.max(left, 0)
        expert = tl.min(tl.where(left == best, at, WIDE), 0)
        tl.store(ids + row * K + k, expert.to(tl.int64))
        chosen = tl.where(k_at == k, best, chosen)
        total += best
        left = tl.where(at == expert, -1.0, left)
    if NORMED:
        chosen /= total
    tl.store(weights + row * K + k_at, chosen.to(logits.dtype.element_ty).to(tl.float32), mask=k_at < K)


def route(logits: Tensor, choices: int, normed: bool) -> tuple[Tensor, Tensor]:
    """Ids int64 and weights fp32 [T, K] of the top `choices` experts of logits [T, E], contiguous, after a softmax in
    fp32. `normed` makes the weights of a row add up to 1. Weights are rounded to the logits' dtype."""
    tokens, experts = logits.shape
    ids = logits.new_empty(tokens, choices, dtype=torch.int64)
    weights = logits.new_empty(tokens, choices, dtype=torch.float32)
    if tokens:
        sizes = (experts, triton.next_power_of_2(experts), choices, triton.next_power_of_2(choices))
        _route[(tokens,)](logits, ids, weights, *sizes, normed, num_warps=1)
    return ids, weights
