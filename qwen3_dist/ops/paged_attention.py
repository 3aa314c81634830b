"""Attention of a step's queries over KV blocks: a kernel where there is one, plain torch everywhere else.

Legend: T tokens, H query heads, G KV groups, d head_dim.
"""

from __future__ import annotations

from torch import Tensor

from qwen3_dist.ops.batch import LayerCache, StepBatch
from qwen3_dist.ops.cuda.attention import gpu_attention
from qwen3_dist.ops.kernels import kernels_for
from qwen3_dist.ops.torch_attention import gathered_attention


def write_cache(cache: LayerCache, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Stores k and v [T, G, d] at their `slots` [T]."""
    cache.keys.flatten(0, 1)[slots] = k
    cache.values.flatten(0, 1)[slots] = v


def paged_attention(q: Tensor, cache: LayerCache, batch: StepBatch, window: int | None) -> Tensor:
    """Causal attention of q [T, H, d] over everything its sequences have cached -> [T, H, d].

    `window` limits each query to that many latest positions, itself included.
    """
    kernels = kernels_for(q)
    if kernels is not None:
        where = (batch.block_tables, batch.table_rows, batch.context_lens, batch.query_starts)
        return kernels.attention(q, cache.keys, cache.values, *where, window)
    if q.is_cuda:
        _, block_size, groups, dim = cache.keys.shape
        return gpu_attention(q.device, q.dtype, q.shape[1], groups, dim, block_size)(q, cache, batch, window)
    return gathered_attention(q, cache, batch, window)
