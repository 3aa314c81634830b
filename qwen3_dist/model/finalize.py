"""Finalizes a loaded model: converts weights to the layout of its Ops, and replaces sublayers and whole stages by
fused kernels if the Ops has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from qwen3_dist.model.block import TransformerBlock
from qwen3_dist.model.experts import Experts
from qwen3_dist.model.feed_forward import MoEFeedForward
from qwen3_dist.model.linear import Products
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.ops.adapter_rows import AdapterRows
from qwen3_dist.ops.base import (
    AttentionParts,
    BlockKernels,
    BlockParts,
    FeedForwardParts,
    HeadParts,
    MoEParts,
    Ops,
    StageKernels,
)
from qwen3_dist.ops.batch import LayerCache, StepBatch


def finalize(model: Qwen3Model, int8: bool = False) -> None:
    """Finalizes a model whose weights are loaded. Afterwards weights must keep their addresses.

    `int8` quantizes the weights of all products except the routers. Layers are converted one by one, so that memory
    holds little more than the weights.
    """
    finalize_head(model, int8)
    convert_blocks(model.blocks, int8)
    fuse(model)


def finalize_head(model: Qwen3Model, int8: bool = False) -> None:
    """Converts the weights of the output head, which a tied embedding shares unless they are int8."""
    if model.parallel.pipeline.is_last:
        model.out_head.finalize(int8)
        if model.config.tie_word_embeddings and not int8:
            model.tok_emb.share(model.out_head.weights)


def fuse(model: Qwen3Model) -> None:
    """Replaces sublayers, and the whole stage, of a model whose weights are converted by fused kernels, if its Ops has
    them."""
    last = model.parallel.pipeline.is_last
    head = HeadParts(model.final_norm.weights, model.out_head.weights) if last else None
    kernels = _fuse_blocks(model.blocks, model.ops, head)
    if kernels is not None:
        model.whole_stage = WholeStage(model, kernels)


def finalize_blocks(
    blocks: Sequence[TransformerBlock], ops: Ops, int8: bool = False, head: HeadParts | None = None
) -> StageKernels | None:
    """Finalizes some blocks. `head` is the finalized head after them, if any. Returns fused kernels of all blocks, or
    None."""
    convert_blocks(blocks, int8)
    return _fuse_blocks(blocks, ops, head)


def convert_blocks(blocks: Sequence[TransformerBlock], int8: bool) -> None:
    """Converts the weights of some blocks."""
    for block in blocks:
        for weights in _products(block):
            weights.finalize(int8)
        if isinstance(block.ff, MoEFeedForward):
            block.ff.gate.finalize()


def _fuse_blocks(blocks: Sequence[TransformerBlock], ops: Ops, head: HeadParts | None) -> StageKernels | None:
    kernels = ops.fuse([_parts(block) for block in blocks], head)
    if kernels is not None:
        for block, of_block in zip(blocks, kernels.blocks, strict=True):
            _replace_sublayers(block, of_block)
    return kernels


def _products(block: TransformerBlock) -> Iterator[Products | Experts]:
    """The products of a block that int8 quantizes."""
    yield from (block.att.qkv, block.att.out_proj)
    if isinstance(block.ff, MoEFeedForward):
        yield block.ff.experts
    else:
        yield from (block.ff.gate_up, block.ff.fc3)


def tensors_of_block(block: TransformerBlock) -> list[Tensor]:
    """All tensors of a finalized block's weights, without adapters, in an order that its form decides."""
    tensors = [parameter.data for parameter in block.parameters()]
    for products in _products(block):
        tensors += products.weights.tensors
    if isinstance(block.ff, MoEFeedForward):
        tensors += block.ff.gate.weights.tensors
    return tensors


def tensors_beside_blocks(model: Qwen3Model) -> list[Tensor]:
    """As `tensors_of_block`, of what a finalized model has beside its blocks: embedding, last norm, head."""
    tensors = [p.data for name, p in model.named_parameters() if not name.startswith("blocks.")]
    return tensors + [*model.out_head.weights.tensors] if model.parallel.pipeline.is_last else tensors


def _parts(block: TransformerBlock) -> BlockParts:
    att, ff = block.att, block.ff
    attention = AttentionParts(
        norm=block.norm1.weights,
        qkv=att.qkv.weights,
        out=att.out_proj.weights,
        q_norm=att.q_norm.weights if att.q_norm is not None else None,
        k_norm=att.k_norm.weights if att.k_norm is not None else None,
        head_dim=att.head_dim,
        window=att.window,
    )
    if not isinstance(ff, MoEFeedForward):
        return attention, FeedForwardParts(block.norm2.weights, ff.gate_up.weights, ff.fc3.weights)
    return attention, MoEParts(
        norm=block.norm2.weights,
        gate=ff.gate.weights,
        experts=ff.experts.weights,
        places=ff.all_gather.places,
        counts=ff.experts.all_counts,
        choices=ff.num_experts_per_tok,
        norm_topk_prob=ff.norm_topk_prob,
    )


def _replace_sublayers(block: TransformerBlock, kernels: BlockKernels) -> None:
    """Makes the block use fused kernels in steps without adapters and padding."""
    attend, transform = block.attend, block.transform

    def attend_by_kernel(x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache, batch: StepBatch) -> Tensor:
        if batch.adapters is not None:
            return attend(x, cos, sin, cache, batch)
        return kernels.attention(x, cos, sin, cache, batch)

    def transform_by_kernel(x: Tensor, padding: Tensor | None, adapters: AdapterRows | None) -> Tensor:
        if padding is not None or adapters is not None:
            return transform(x, padding, adapters)
        return kernels.feed_forward(x)

    block.attend, block.transform = attend_by_kernel, transform_by_kernel


class WholeStage:
    """Runs all blocks of a stage, and the head after the last, by one fused kernel."""

    def __init__(self, model: Qwen3Model, kernels: StageKernels) -> None:
        self._kernels = kernels
        self._tp = model.parallel.tp
        self._exchanges_tokens = bool(model.config.num_experts) and model.parallel.dp.size > 1
        self._has_experts = bool(model.config.num_experts)
        self._rows = model.out_head.out_features if model.parallel.pipeline.is_last else None

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: list[LayerCache], batch: StepBatch
    ) -> tuple[Tensor, Tensor | None] | None:
        """x [T, D] -> hidden states [T, D] and, on the last stage, this rank's logits [L, v]. Changes x in place.

        Returns None for a step that the kernel does not support: all-to-all, dp groups, adapters or padding."""
        exchanges = self._exchanges_tokens or (self._has_experts and batch.all_to_all)
        if exchanges or batch.adapters is not None or batch.padding is not None:
            return None
        logits = None if self._rows is None else x.new_empty(len(batch.logits_rows), self._rows)
        ran = self._tp.in_kernel(
            lambda group, operation: self._kernels.run(x, cos, sin, cache, batch, logits, group, operation)
        )
        return (x, logits) if ran else None
