"""Measures one device (CPU or CUDA) with the engine's kernels: bandwidth, matrix products, attention, experts.

Times are the lower quartile of some repeats, since other programs can only make a repeat slower.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_dist.model.experts import Experts, ExpertShape
from qwen3_dist.ops.base import LinearWeights, Matrix
from qwen3_dist.ops.batch import LayerCache, StepBatch
from qwen3_dist.ops.choose import AttentionShape, choose_ops
from qwen3_dist.parallel.dispatch import DispatchedTokens

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_HEADS, _GROUPS, _HEAD_DIM, _BLOCK = 16, 8, 128, 16
_EXPERTS, _CHOSEN = 64, 8


@dataclass(frozen=True)
class Sizes:
    """Sizes of the probes: weights must not fit into caches, and matrix products must fill the device."""

    inner: int
    outputs: int
    matrices: int
    read_bytes: int
    expert_columns: int
    repeats: int = 5

    @classmethod
    def for_device(cls, device: torch.device) -> Sizes:
        if device.type == "cuda":
            return cls(4096, 12288, 12, 4 << 30, 1536, repeats=9)
        return cls(1024, 6144, 16, 512 << 20, 384)


def seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Lower quartile of the times of a call, after one warm-up call."""
    samples = []
    for turn in range(repeats + 1):
        _synchronize(device)
        started = time.perf_counter()
        call()
        _synchronize(device)
        if turn:
            samples.append(time.perf_counter() - started)
    return statistics.quantiles(samples, n=4, method="inclusive")[0] if len(samples) > 1 else samples[0]


def read_rate(device: torch.device, sizes: Sizes) -> float:
    """Memory read bandwidth in bytes per second, with all of torch's threads."""
    words = torch.ones(sizes.read_bytes // 8, dtype=torch.int64, device=device)
    return words.nbytes / seconds(lambda: words.sum(), device, sizes.repeats)


@torch.inference_mode()
def row_seconds(device: torch.device, sizes: Sizes, rows: tuple[int, ...] = ROWS) -> dict[int, float]:
    """Seconds per weight of bf16 matrix products, by number of rows; weights are read from memory, not from caches."""
    ops = choose_ops(device, torch.bfloat16)
    matrices = (
        Matrix(_random_bf16(sizes.outputs, sizes.inner, device), sizes.outputs) for _ in range(sizes.matrices)
    )
    kept = [ops.finalize_linear(LinearWeights((matrix,)), int8=False) for matrix in matrices]
    found = {}
    for count in rows:
        x = _random_bf16(count, sizes.inner, device)
        used = kept if count <= 128 or device.type == "cuda" else kept[: max(2, len(kept) // 4)]

        def call(x: Tensor = x, used: list[LinearWeights] = used) -> None:
            for weights in used:
                ops.linear(x, weights)

        took = seconds(call, device, sizes.repeats if count <= 64 else 3)
        found[count] = took / (len(used) * sizes.outputs * sizes.inner)
    return found


@torch.inference_mode()
def expert_seconds(device: torch.device, sizes: Sizes, tokens: int) -> float:
    """Seconds of one layer of experts for `tokens` tokens with random routing."""
    ops = choose_ops(device, torch.bfloat16)
    with device, _default_dtype(torch.bfloat16):
        experts = Experts(_EXPERTS, ExpertShape.of_columns(sizes.inner, sizes.expert_columns), ops)
    experts.requires_grad_(False)
    for stack in (experts.fc1, experts.fc2, experts.fc3):
        stack.normal_(0, 0.02)
    experts.finalize()
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, _EXPERTS, generator=generator).topk(_CHOSEN).indices.to(device)
    weights = torch.full((tokens, _CHOSEN), 1 / _CHOSEN, device=device)
    received = DispatchedTokens(_random_bf16(tokens, sizes.inner, device), ids, weights)
    return seconds(lambda: experts(received), device, sizes.repeats)


def expert_shape(sizes: Sizes) -> tuple[int, int, int]:
    """Number of experts, experts per token, and weights per expert in `expert_seconds`."""
    return _EXPERTS, _CHOSEN, 3 * sizes.inner * sizes.expert_columns


@torch.inference_mode()
def attention_seconds(
    device: torch.device, sequences: int, context: int, queries: int, repeats: int
) -> float:
    """Seconds of attention in one layer: the last `queries` tokens of each sequence over its whole context."""
    width = context // _BLOCK
    layers = 4  # several, so that keys are not still in the CPU's caches

    def blocks() -> Tensor:
        numbers = _random_bf16(sequences * width, _BLOCK * _GROUPS * _HEAD_DIM, device)
        return numbers.view(sequences * width, _BLOCK, _GROUPS, _HEAD_DIM)

    caches = [LayerCache(blocks(), blocks()) for _ in range(layers)]
    tables = torch.randperm(sequences * width).view(sequences, width).to(device)
    batch = StepBatch(
        token_ids=tables[:0],
        positions=tables[:0],
        slots=tables[:0],
        block_tables=tables.int(),
        table_rows=torch.arange(sequences, device=device),
        context_lens=torch.full((sequences,), context, device=device),
        query_starts=torch.arange(sequences + 1, device=device) * queries,
        query_lens=(queries,) * sequences,
        host_context_lens=(context,) * sequences,
        num_decodes=sequences if queries == 1 else 0,
        all_to_all=False,
        logits_rows=tables[:0],
    )
    ops = choose_ops(device, torch.bfloat16, AttentionShape(_HEADS, _GROUPS, _HEAD_DIM, _BLOCK))
    q = _random_bf16(sequences * queries, _HEADS * _HEAD_DIM, device).view(-1, _HEADS, _HEAD_DIM)

    def call() -> None:
        for cache in caches:
            ops.attention(q, cache, batch, None)

    return seconds(call, device, repeats) / layers


def attention_costs(context: int, queries: int) -> tuple[float, float]:
    """KV-cache bytes and floating-point operations of one sequence in `attention_seconds`."""
    pairs = sum(range(context - queries + 1, context + 1))
    return 2.0 * context * _GROUPS * _HEAD_DIM * 2, 4.0 * pairs * _HEADS * _HEAD_DIM


def _random_bf16(rows: int, columns: int, device: torch.device) -> Tensor:
    return (torch.randn(rows, columns, device=device) * 0.02).to(torch.bfloat16)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """A context in which modules are built of this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
