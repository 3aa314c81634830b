"""The sharded Qwen3 transformer: what one rank holds and computes.

Reads top to bottom like the reference architecture; `reference.py` is the same model unsharded.
Legend: T tokens of this dp group's step (0 if it is idle), N = ceil(T / tp) tokens a rank owns in MoE layers,
D emb_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3_dist.config import ModelConfig
from qwen3_dist.expert_placement import ExpertPlacement, Placements, even_placements
from qwen3_dist.layout import padded_range
from qwen3_dist.model.attention import GroupedQueryAttention, make_norm
from qwen3_dist.model.experts import Experts
from qwen3_dist.model.feed_forward import FeedForward, MoEFeedForward
from qwen3_dist.model.linear import Linear
from qwen3_dist.model.rope import RopeTables
from qwen3_dist.model.vocabulary import VocabParallelEmbedding, VocabParallelHead
from qwen3_dist.ops.batch import LayerCache, StepBatch
from qwen3_dist.ops.kernels import Blocks, kernels_for
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.parallel.send_plan import OverflowFlag


class Qwen3Model(nn.Module):
    """This rank's shard of the whole model. Build it on the meta device and let the loader fill it."""

    _fused: Blocks | None = None  # all of this rank's, once they are one call

    def __init__(
        self, config: ModelConfig, parallel: ParallelContext, placements: Placements | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.parallel = parallel
        placements = placements or even_placements(config, parallel.ep.size)
        self._overflow = OverflowFlag()
        stage, tied = parallel.pipeline, config.tie_word_embeddings
        if stage.is_first or (stage.is_last and tied):
            self.tok_emb = VocabParallelEmbedding(config.vocab_size, config.emb_dim, parallel.tp)
        layers = parallel.layout.layers_of(stage.stage, config.n_layers)
        self.blocks = nn.ModuleList(
            TransformerBlock(config, layer, parallel, placements.get(layer), self._overflow)
            for layer in layers
        )
        if stage.is_last:
            self.final_norm = make_norm(config, config.emb_dim)
            self.out_head = VocabParallelHead(config.emb_dim, config.vocab_size, parallel.tp)
            if tied:
                self.out_head.weight = self.tok_emb.weight  # type: ignore[assignment]
        self._rope = RopeTables(config)

    def forward(self, batch: StepBatch, cache: list[LayerCache]) -> Tensor | None:
        """Logits [L, vocab_size] of `batch.logits_rows` on tp rank 0 of the last stage, None on other ranks."""
        return self.hidden_and_logits(batch, cache)[1]

    def hidden_and_logits(
        self, batch: StepBatch, cache: list[LayerCache]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns hidden states [T, D] and logits [L, V]; both are None on earlier stages and without tokens, logits
        also on other tp ranks than 0."""
        tokens, stage = batch.token_ids.shape[0], self.parallel.pipeline
        if not tokens:
            self._take_part(batch)
            return None, None
        x, logits = self.stage(batch, cache, None if stage.is_first else stage.receive(tokens, self.like))
        if not stage.is_last:
            stage.send(x)
            return None, None
        return x, logits

    def stage(
        self, batch: StepBatch, cache: list[LayerCache], arrived: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns this stage's hidden states [T, D], and logits [L, V] on tp rank 0 of the last stage.

        `arrived` [T, D] is what the stage before sent, None on the first."""
        stage = self.parallel.pipeline
        x = self.tok_emb(batch.token_ids) if arrived is None else arrived
        if batch.padding is not None and self.parallel.dp.size > 1 and not batch.all_to_all:
            batch = replace(batch, padding=self.parallel.dp.all_gather(batch.padding))
        cos, sin = self._rope.rows(batch.positions, max(batch.host_context_lens), x.dtype)
        in_one_call, own_logits = self._in_one_call(x, cos, sin, cache, batch)
        if not in_one_call:
            for block, layer_cache in zip(self._blocks, cache, strict=True):
                x = block(x, cos, sin, layer_cache, batch)
        if not stage.is_last:
            return x, None
        if own_logits is not None:
            return x, self.out_head.gathered(own_logits)
        return x, self.logits(x[batch.logits_rows])

    def _in_one_call(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: list[LayerCache], batch: StepBatch
    ) -> tuple[bool, Tensor | None]:
        """x [T, D] becomes what the blocks make of it in one call of a kernel, where nothing keeps
        them from that, and the head, where it is in the call too, makes this rank's logits [L, v] of them."""
        fused = self._fused
        apart = self.config.num_experts and (batch.all_to_all or self.parallel.dp.size > 1)
        if fused is None or apart or batch.adapters is not None or batch.padding is not None:
            return False, None
        caches = [(layer.keys, layer.values) for layer in cache]
        own_logits = logits = None
        if fused.head is not None:
            own_logits = x.new_empty(len(batch.logits_rows), self.out_head.rows_per_rank)
            logits = (batch.logits_rows, own_logits)
        ran = self.parallel.tp.in_kernel(
            lambda group, operation: fused.run(x, caches, (cos, sin), batch.where, logits, group, operation)
        )
        return (True, own_logits) if ran else (False, None)

    def logits(self, x: Tensor) -> Tensor | None:
        """Rows [L, D] of the last block's -> [L, vocab_size] on tp rank 0, None on others. All ranks of the stage call
        it."""
        return self.out_head(self.final_norm(x))

    def take_overflow(self) -> Tensor:
        """[1] fp32, more than 0 if some exchange of experts' rows since the last call did not fit its capacity on some
        rank of this stage, so that what steps made is void. All ranks of the stage call it."""
        return self._overflow.take(self.parallel.tp, self.parallel.dp)

    def _take_part(self, batch: StepBatch) -> None:
        """What a dp group without tokens does: its ranks' share of the experts' work for the others."""
        x = self.like.new_empty(0, self.config.emb_dim)
        for block in self._blocks:
            block.feed_forward(x, x, batch)

    @property
    def moe_layers(self) -> dict[int, MoEFeedForward]:
        """The mixtures of experts of this stage, by layer."""
        return {block.layer: block.ff for block in self._blocks if isinstance(block.ff, MoEFeedForward)}

    @property
    def _blocks(self) -> Iterator[TransformerBlock]:
        return (block for block in self.blocks if isinstance(block, TransformerBlock))

    @property
    def like(self) -> Tensor:
        """[D], where and of what dtype this rank's activations are."""
        return self.blocks[0].norm1.scale  # type: ignore[union-attr, return-value]

    @property
    def device(self) -> torch.device:
        return self.like.device

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    def quantize(self) -> None:
        """Keeps all products' weights but the routers' as int8 from now on, one after the other."""
        for name, module in self.named_modules():
            if isinstance(module, Linear | Experts | VocabParallelHead) and not name.endswith(".gate"):
                module.quantize()

    def pack(self) -> None:
        """Lays all products' weights out as this machine's kernels read them, one after the other.

        Weights must stay where they are from then on.
        """
        kernels = kernels_for(self.like)
        if kernels is None:
            if self.device.type == "cuda":
                self.join()
            return
        last = self.parallel.pipeline.is_last
        for module in self.modules():
            if isinstance(module, Linear | Experts | VocabParallelHead):
                module.pack(kernels)
        if last and self.config.tie_word_embeddings and self.out_head.scale is None:
            self.tok_emb.weight = self.out_head.weight
        for block in self._blocks:
            block.att.fuse(block.norm1, kernels)
            block.ff.fuse(block.norm2, kernels)
        halves = [(b.att.fused, b.ff.fused, isinstance(b.ff, MoEFeedForward)) for b in self._blocks]
        whole = [(att, ff, is_moe) for att, ff, is_moe in halves if att is not None and ff is not None]
        if len(whole) == len(halves):
            self._fused = Blocks(
                kernels, whole, self.out_head.fused(self.final_norm, kernels) if last else None
            )

    def join(self) -> None:
        """Makes the products that share an input one, as fits a GPU."""
        for block in self._blocks:
            block.att.join()
            if isinstance(block.ff, FeedForward):
                block.ff.join()


class TransformerBlock(nn.Module):
    """Attention and feed-forward with their residuals; x [T, D] is the same on every tp rank."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        parallel: ParallelContext,
        placement: ExpertPlacement | None,
        overflow: OverflowFlag | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self._tp = parallel.tp
        self.norm1 = make_norm(config, config.emb_dim)
        self.att = GroupedQueryAttention(config, layer, parallel.tp.size)
        self.norm2 = make_norm(config, config.emb_dim)
        self.ff: FeedForward | MoEFeedForward
        if placement is not None:
            self.ff = MoEFeedForward(config, parallel, placement, overflow)
        else:
            _, columns = padded_range(config.hidden_dim, parallel.tp.size, parallel.tp.rank)
            self.ff = FeedForward(config.emb_dim, columns)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache, batch: StepBatch) -> Tensor:
        attended = self.att(x, self.norm1, cos, sin, cache, batch)
        return self.feed_forward(x, attended, batch)

    def feed_forward(self, x: Tensor, attended: Tensor, batch: StepBatch) -> Tensor:
        """The block's second half, from attention's partial sums on. Without rows it is a share of others' experts."""
        if not len(x) and isinstance(self.ff, FeedForward):
            return x
        if isinstance(self.ff, MoEFeedForward) and batch.all_to_all:
            return self._route(x, attended, self.ff, batch)
        x = self._tp.add_all_reduced(x, attended)
        if isinstance(self.ff, MoEFeedForward):
            return self._tp.add_all_reduced(x, self.ff.gathered(x, self.norm2, batch))
        return self._tp.add_all_reduced(x, self.ff(x, self.norm2, batch.adapters))

    def _route(self, x: Tensor, attended: Tensor, moe: MoEFeedForward, batch: StepBatch) -> Tensor:
        """The MoE half by all-to-all: each tp rank owns N of the tokens, so that none is routed twice."""
        total = x.shape[0]
        rows, chunk = padded_range(total, self._tp.size, self._tp.rank)
        padding = chunk * self._tp.size - total
        own = F.pad(x[rows.start : rows.stop], (0, 0, 0, chunk - len(rows)))
        own = own + self._tp.reduce_scatter(F.pad(attended, (0, 0, 0, padding)))
        own = own + moe.dispatched(self.norm2(own), rows, batch)
        return self._tp.all_gather(own)[:total]


def build_on_meta(
    config: ModelConfig, parallel: ParallelContext, dtype: torch.dtype, placements: Placements | None = None
) -> Qwen3Model:
    """This rank's model with shapes and dtypes but no storage, in evaluation mode."""
    with torch.device("meta"):
        model = Qwen3Model(config, parallel, placements).to(dtype)
    return model.eval().requires_grad_(False)
