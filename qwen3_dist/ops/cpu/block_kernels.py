"""Block kernels for CPUs: a sublayer of a transformer block, or all blocks of a stage, in one call of C++.

For few tokens, Python between the operations would take as long as the operations themselves, since weights displace
Python's data from the CPU caches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen3_dist.ops.base import AttentionParts, BlockParts, FeedForwardParts, HeadParts, MoEParts
from qwen3_dist.ops.batch import LayerCache, StepBatch
from qwen3_dist.ops.cpu.kernels import Kernels, suffix_of
from qwen3_dist.ops.cpu.structs import (
    AttentionKernel,
    AttentionMetadata,
    Block,
    ExpertsKernel,
    FeedForwardKernel,
    Head,
    Logits,
    address,
    addresses,
    caches_of,
)


class CpuBlockKernels:
    """`BlockKernels` for packed weights and plain norms."""

    def __init__(self, kernels: Kernels, block: BlockParts) -> None:
        attention, feed_forward = block
        self._parts = block  # keeps the tensors that the structures point to
        self._kernels = kernels
        self.suffix = suffix_of(attention.out.parts[0].weight)
        self.attention_kernel = _attention_kernel(attention)
        self.dense: FeedForwardKernel | None = None
        self.experts: ExpertsKernel | None = None
        if isinstance(feed_forward, FeedForwardParts):
            self.dense, self._name = feed_forward_kernel(feed_forward), f"feed_forward_kernel{self.suffix}"
        else:
            self.experts, self._name = _experts_kernel(feed_forward), f"experts_kernel{self.suffix}"
        self._feed_forward = address(self.dense or self.experts)

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache, batch: StepBatch) -> Tensor:
        out, metadata = torch.empty_like(x), attention_metadata(batch, cache)
        tensors, layer = (cos, sin), caches_of([cache])
        kernel = address(self.attention_kernel)
        self._kernels.run(
            f"attention_kernel{self.suffix}", kernel, x, out, address(layer), *tensors, address(metadata)
        )
        return out

    def feed_forward(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        self._kernels.run(self._name, self._feed_forward, x, out, len(x))
        return out


class CpuStageKernels:
    """`StageKernels` for packed weights and plain norms."""

    def __init__(self, kernels: Kernels, blocks: Sequence[BlockParts], head: HeadParts | None) -> None:
        self.blocks = [CpuBlockKernels(kernels, block) for block in blocks]
        self._kernels = kernels
        self._name = f"blocks{self.blocks[0].suffix}"
        self._structs = (Block * len(blocks))(
            *(
                Block(address(each.attention_kernel), address(each.dense), address(each.experts))
                for each in self.blocks
            )
        )
        self._head_parts = head
        self._head = _head(head) if head is not None else None

    def run(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        caches: Sequence[LayerCache],
        batch: StepBatch,
        logits: Tensor | None,
        group: int,
        operation: int,
    ) -> int:
        layers = caches_of(caches)
        metadata = attention_metadata(batch, caches[0])
        logits_task = None
        if logits is not None:
            rows = batch.logits_rows
            logits_task = Logits(address(self._head), address(rows), len(rows), address(logits))
        pointers = (address(metadata), address(logits_task), group)
        blocks, cached = address(self._structs), address(layers)
        done: int = self._kernels.run(
            self._name, blocks, len(self.blocks), x, cached, cos, sin, *pointers, operation
        )
        return done


def attention_metadata(batch: StepBatch, cache: LayerCache) -> AttentionMetadata:
    """The attention metadata of a batch, with addresses of the batch's tensors, which must stay alive."""
    tensors = (
        batch.slots,
        batch.block_tables,
        batch.table_rows,
        batch.context_lens,
        batch.query_starts,
    )
    assert all(tensor.is_contiguous() for tensor in tensors)
    sizes = (len(batch.slots), len(batch.context_lens), cache.keys.shape[1], batch.block_tables.shape[1])
    return AttentionMetadata(*map(address, tensors), *sizes)


def _attention_kernel(parts: AttentionParts) -> AttentionKernel:
    q, k, _ = parts.qkv.parts
    (out,) = parts.out.parts
    products = (*parts.qkv.parts, out)
    return AttentionKernel(
        norm_scale=address(parts.norm.scale),
        q_scale=address(parts.q_norm.scale) if parts.q_norm is not None else 0,
        k_scale=address(parts.k_norm.scale) if parts.k_norm is not None else 0,
        weights=addresses([each.weight for each in products]),
        scales=addresses([each.scale for each in products]),
        biases=addresses([each.bias for each in products]),
        dim=out.outputs,
        heads=q.outputs // parts.head_dim,
        groups=k.outputs // parts.head_dim,
        head_dim=parts.head_dim,
        window=parts.window or 0,
        eps=parts.norm.eps,
    )


def feed_forward_kernel(parts: FeedForwardParts) -> FeedForwardKernel:
    products = (*parts.gate_up.parts, *parts.down.parts)
    return FeedForwardKernel(
        norm_scale=address(parts.norm.scale),
        weights=addresses([each.weight for each in products]),
        scales=addresses([each.scale for each in products]),
        dim=products[2].outputs,
        inner=products[0].outputs,
        eps=parts.norm.eps,
    )


def _experts_kernel(parts: MoEParts) -> ExpertsKernel:
    (gate,) = parts.gate.parts
    return ExpertsKernel(
        norm_scale=address(parts.norm.scale),
        gate=address(gate.weight),
        weights=addresses(parts.experts.stacks),
        scales=addresses(parts.experts.scales or (None, None, None)),
        places=address(parts.places),
        counts=address(parts.counts[1:]),
        tables=len(parts.places),
        experts=gate.outputs,
        local_experts=len(parts.experts.stacks[0]),
        choices=parts.choices,
        norms_weights=parts.norm_topk_prob,
        dim=len(parts.norm.scale),
        inner=parts.experts.columns,
        eps=parts.norm.eps,
    )


def _head(parts: HeadParts) -> Head:
    (product,) = parts.weights.parts
    return Head(
        norm_scale=address(parts.norm.scale),
        weight=address(product.weight),
        scale=address(product.scale),
        dim=len(parts.norm.scale),
        outputs=product.outputs,
        eps=parts.norm.eps,
    )
