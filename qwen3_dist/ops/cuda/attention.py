"""Chooses the attention backend of a GPU: the first of these that gives correct results on this card.

FlashAttention 3 over block tables, on cards of compute capability 9 with its package installed; our Triton kernel;
plain torch, which copies the blocks of each sequence first.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qwen3_dist.ops.batch import LayerCache, StepBatch
from qwen3_dist.ops.probe import failure, log_failure
from qwen3_dist.ops.torch_attention import gathered_attention

Attention = Callable[[Tensor, LayerCache, StepBatch, int | None], Tensor]
_FLASH_PACKAGE = "flash_attn_interface"  # of FlashAttention 3, which torch can use as its own implementation


class Backend(NamedTuple):
    """An attention backend. `why_not`, of the device and the dtypes of activations and KV cache, makes it ready, or
    returns the reason why it cannot be used."""

    name: str
    attend: Attention
    why_not: Callable[[torch.device, torch.dtype, torch.dtype], str | None] = lambda *_: None


class Chosen(NamedTuple):
    """The chosen backend, and for each better one the reason, in one line, why it is not used."""

    backend: Backend
    reasons: tuple[str, ...]


def flash(q: Tensor, cache: LayerCache, batch: StepBatch, window: int | None) -> Tensor:
    """FlashAttention 3 through `torch.nn.attention.varlen.varlen_attn`, after `activate_flash`. Supports any block
    size."""
    from torch.nn.attention.varlen import varlen_attn

    tables, lens, starts = batch.int32_metadata
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
    assert isinstance(out, Tensor)  # it is a tuple only if more outputs are requested
    return out


def activate_flash(
    device: torch.device, dtype: torch.dtype, cache_dtype: torch.dtype | None = None
) -> str | None:
    """Makes torch's attention operators in this process use FlashAttention 3. Returns the reason if they cannot."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, not {_name(dtype)}"
    if cache_dtype not in (None, dtype):
        return f"its KV cache must be in {_name(dtype)}, not {_name(cache_dtype or dtype)}"
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return f"it needs compute capability 9, not {major}.{minor}"
    if importlib.util.find_spec(_FLASH_PACKAGE) is None:
        return f"the package {_FLASH_PACKAGE} is not installed"
    try:
        from torch.nn.attention import activate_flash_attention_impl
        from torch.nn.attention.varlen import varlen_attn

        if "block_table" not in inspect.signature(varlen_attn).parameters:
            return f"torch {torch.__version__} has no block tables for it"
        activate_flash_attention_impl("FA3")
    except Exception as error:  # also of a package that was built for another torch
        return f"{type(error).__name__}: {error}"
    return None


def triton(q: Tensor, cache: LayerCache, batch: StepBatch, window: int | None) -> Tensor:
    """Our Triton kernel: decodes with their keys split over several programs, then the other sequences."""
    from qwen3_dist.ops.cuda.triton_attention import attention, splits_for

    n = batch.num_decodes
    tables, rows, lens, starts = batch.block_tables, batch.table_rows, batch.context_lens, batch.query_starts
    parts = []
    if n:
        splits = splits_for(n, cache.keys.shape[2], _processors(q.device))
        metadata = (tables, rows[:n], lens[:n], starts[: n + 1])
        parts.append(attention(q[:n], cache, *metadata, window, 1, splits))
    if n < len(batch.query_lens):
        longest = max(batch.query_lens[n:])
        metadata = (tables, rows[n:], lens[n:], starts[n:] - n)
        parts.append(attention(q[n:], cache, *metadata, window, longest))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def unsplit(q: Tensor, cache: LayerCache, batch: StepBatch, window: int | None) -> Tensor:
    """Our Triton kernel in deterministic mode: one program computes a query with all of its keys, in tiles of one
    size."""
    from qwen3_dist.ops.cuda.triton_attention import FIXED_ROWS, attention

    metadata = (batch.block_tables, batch.table_rows, batch.context_lens, batch.query_starts)
    longest = max(batch.query_lens)
    return attention(q, cache, *metadata, window, longest, fixed_rows=FIXED_ROWS)


UNSPLIT = Backend("Triton", unsplit)
BACKENDS = (Backend("FlashAttention 3", flash, activate_flash), Backend("Triton", triton))
PLAIN = Backend("plain torch", gathered_attention)


@functools.cache
def chosen_attention(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    groups: int,
    dim: int,
    block_size: int,
    cache_dtype: torch.dtype | None = None,
) -> Chosen:
    """The first backend that works for these shapes. Each is tested on a small problem. `cache_dtype` is `dtype` if
    None."""
    query_lens, context_lens = (1, 1, 5), (3, block_size + 1, block_size + 5)
    width = -(-max(context_lens) // block_size)
    blocks = torch.arange(3 * width, device=device).view(3, width)
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    keys, values = drawn(2, 3 * width, block_size, groups, dim).to(cache_dtype or dtype)
    cache = LayerCache(keys, values)
    q, nothing = drawn(7, heads, dim), blocks[:0]
    batch = StepBatch(
        token_ids=nothing,
        positions=nothing,
        slots=nothing,
        block_tables=blocks.int(),
        table_rows=torch.arange(len(query_lens), device=device),
        context_lens=torch.tensor(context_lens, device=device),
        query_starts=torch.tensor((0, 1, 2, 7), device=device),
        query_lens=query_lens,
        host_context_lens=context_lens,
        num_decodes=2,
        all_to_all=False,
        logits_rows=nothing,
    )
    expected = gathered_attention(q, cache, batch, None)
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    reasons: list[str] = []
    for backend in BACKENDS:
        reason = backend.why_not(device, dtype, cache_dtype or dtype)
        if reason is None:
            reason = failure(functools.partial(backend.attend, q, cache, batch, None), expected, tolerance)
            if reason is None:
                return Chosen(backend, tuple(reasons))
            log_failure(f"Attention by {backend.name}", "the next way to attend is tried", reason)
        reasons.append(f"{backend.name}: {reason}")
    return Chosen(PLAIN, tuple(reasons))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
