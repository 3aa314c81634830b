"""Attention over KV blocks in plain torch, for every device: gathers the blocks of each sequence first.

The R heads of a KV group are treated as R query rows of that group, so keys are not repeated in memory.
Legend: T tokens, S sequences, H query heads, G KV groups (H = G * R), d head_dim, L keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_dist.ops.batch import LayerCache, StepBatch
from qwen3_dist.ops.kv_codes import read


def gathered_attention(q: Tensor, cache: LayerCache, batch: StepBatch, window: int | None) -> Tensor:
    """Implements `Ops.attention`: one batch of all decodes, then a loop over the other sequences."""
    out = torch.empty_like(q)
    n = batch.num_decodes
    if n:
        out[:n] = _decode(q[:n], cache, batch, window)
    row = n
    for index in range(n, len(batch.query_lens)):
        length = batch.query_lens[index]
        out[row : row + length] = _prefill(q[row : row + length], cache, batch, index, window)
        row += length
    return out if cache.value_scale == 1 else out * cache.value_scale


def _decode(q: Tensor, cache: LayerCache, batch: StepBatch, window: int | None) -> Tensor:
    """Attention of one query per sequence, q [S, H, d], over keys [S, L, G, d] padded to the longest sequence."""
    n, block_size = q.shape[0], cache.keys.shape[1]
    longest = max(batch.host_context_lens[:n])
    tables = batch.block_tables[batch.table_rows[:n], : -(-longest // block_size)]
    k, v = (read(each, tables, q.dtype).flatten(1, 2).transpose(1, 2) for each in (cache.keys, cache.values))
    key_positions = torch.arange(k.shape[2], device=q.device)
    last = batch.context_lens[:n, None] - 1
    visible = key_positions <= last
    if window is not None:
        visible &= key_positions > last - window
    grouped = q.unflatten(1, (k.shape[1], -1))
    scale = _scale(q, cache)
    return F.scaled_dot_product_attention(grouped, k, v, visible[:, None, None], scale=scale).flatten(1, 2)


def _prefill(q: Tensor, cache: LayerCache, batch: StepBatch, index: int, window: int | None) -> Tensor:
    """Attention of a chunk of one sequence, q [T, H, d], whose last query is the sequence's last token."""
    length, context, block_size = q.shape[0], batch.host_context_lens[index], cache.keys.shape[1]
    table = batch.block_tables[batch.table_rows[index], : -(-context // block_size)]
    k, v = (
        read(each, table, q.dtype).flatten(0, 1)[:context].transpose(0, 1)
        for each in (cache.keys, cache.values)
    )
    key_positions = torch.arange(context, device=q.device)
    query_positions = torch.arange(context - length, context, device=q.device)[:, None]
    visible = key_positions <= query_positions
    if window is not None:
        visible &= key_positions > query_positions - window
    groups, heads_per_group = k.shape[0], q.shape[1] // k.shape[0]
    grouped = q.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)
    mask = visible.repeat(heads_per_group, 1)
    batched, scale = (grouped[None], k[None], v[None], mask[None, None]), _scale(q, cache)
    attended = F.scaled_dot_product_attention(*batched, scale=scale)[0]
    return attended.unflatten(1, (heads_per_group, length)).permute(2, 0, 1, 3).flatten(1, 2)


def _scale(q: Tensor, cache: LayerCache) -> float:
    """The scale of scores, with that of the keys' codes."""
    return float(q.shape[-1] ** -0.5 * cache.key_scale)
