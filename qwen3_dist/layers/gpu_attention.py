"""Which kernel attends on a GPU: the first of these that gives the right answer on this card.

`varlen` is torch's FlashAttention-3 over block tables, where the installed torch and card have it; `triton`
is our own kernel; `gathered` is plain torch, which copies each sequence's blocks first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from qwen3_dist.layers.batch import LayerCache, StepBatch
from qwen3_dist.layers.gathered_attention import gathered_attention

Attention = Callable[[Tensor, LayerCache, StepBatch, int | None], Tensor]


def varlen(q: Tensor, cache: LayerCache, batch: StepBatch, window: int | None) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn`, torch 2.12 or newer; needs FlashAttention 3."""
    from torch.nn.attention.varlen import varlen_attn

    tables, lens, starts = batch.narrow
    out = varlen_attn(
        q,
        cache.keys,
        cache.values,
        starts,
        None,
        max(batch.query_lens),
        max(batch.host_context_lens),
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
        seqused_k=lens,
        block_table=tables,
    )
    assert isinstance(out, Tensor)  # and no pair, since nothing else was asked for
    return out


def triton(q: Tensor, cache: LayerCache, batch: StepBatch, window: int | None) -> Tensor:
    """Decodes with their keys split over the card, then the other sequences."""
    from qwen3_dist.kernels.triton_attention import attention, splits_for

    n, keys, values = batch.num_decodes, cache.keys, cache.values
    tables, lens, starts = batch.block_tables, batch.context_lens, batch.query_starts
    parts = []
    if n:
        splits = splits_for(n, keys.shape[2], _processors(q.device))
        parts.append(attention(q[:n], keys, values, tables[:n], lens[:n], starts[: n + 1], window, 1, splits))
    if n < len(batch.query_lens):
        longest = max(batch.query_lens[n:])
        parts.append(attention(q[n:], keys, values, tables[n:], lens[n:], starts[n:] - n, window, longest))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


BACKENDS: tuple[Attention, ...] = (varlen, triton)


@functools.cache
def gpu_attention(
    device: torch.device, dtype: torch.dtype, heads: int, groups: int, dim: int, block_size: int
) -> Attention:
    """The first backend that works for these shapes, found by trying each on a small problem."""
    query_lens, context_lens = (1, 1, 5), (3, block_size + 1, block_size + 5)
    width = -(-max(context_lens) // block_size)
    blocks = torch.arange(3 * width, device=device).view(3, width)
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    cache = LayerCache(*(drawn(3 * width, block_size, groups, dim) for _ in range(2)))
    q, nothing = drawn(7, heads, dim), blocks[:0]
    batch = StepBatch(
        token_ids=nothing,
        positions=nothing,
        slots=nothing,
        block_tables=blocks,
        context_lens=torch.tensor(context_lens, device=device),
        query_starts=torch.tensor((0, 1, 2, 7), device=device),
        query_lens=query_lens,
        host_context_lens=context_lens,
        num_decodes=2,
        all_to_all=False,
        logits_rows=nothing,
    )
    expected = gathered_attention(q, cache, batch, None).float()
    for backend in BACKENDS:
        try:
            error = (backend(q, cache, batch, None).float() - expected).abs().max().item()
        except Exception:
            continue  # whatever it lacks here, it is not the one
        if error <= (1e-3 if dtype == torch.float32 else 5e-2):
            return backend
    return gathered_attention


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
