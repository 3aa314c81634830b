"""The sharded Qwen3 transformer: what one rank holds and computes.

Reads top to bottom like the reference architecture; `reference.py` is the same model unsharded.
Legend: T tokens of this dp group's step (0 if it is idle), D emb_dim, L rows whose logits are wanted, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qwen3_dist.config import ModelConfig
from qwen3_dist.expert_placement import Placements, even_placements
from qwen3_dist.lora_adapters import LoraAdapters
from qwen3_dist.model.block import TransformerBlock
from qwen3_dist.model.feed_forward import MoEFeedForward
from qwen3_dist.model.norm import RMSNorm
from qwen3_dist.model.rope import RopeTables
from qwen3_dist.model.vocabulary import VocabParallelEmbedding, VocabParallelHead
from qwen3_dist.ops.base import Ops
from qwen3_dist.ops.batch import LayerCache, StepBatch
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.parallel.send_plan import OverflowFlag
from qwen3_dist.weights_version import WeightsVersion

# Of x [T, D], cos, sin [T, d], the cache and the batch: hidden states and logits as `Qwen3Model.stage` returns them,
# or None for a batch that the kernels do not take.
Stage = Callable[[Tensor, Tensor, Tensor, list[LayerCache], StepBatch], tuple[Tensor, Tensor | None] | None]


class Qwen3Model(nn.Module):
    """This rank's shard of the whole model. Build it on the meta device and let the loader fill it."""

    blocks: Sequence[TransformerBlock]
    whole_stage: Stage | None = None  # all blocks in one call, where the Ops has that
    kv_cache_dtype: torch.dtype | None = None  # None: the activations'
    adapter_files: Sequence[Any] = ()  # what was read for each place, from which experts that move get theirs
    weights: WeightsVersion | None = WeightsVersion()  # None: a part of them at most was loaded
    adapters = LoraAdapters()  # whose weights the first places of each `LowRank` have; others may follow them

    def __init__(
        self, config: ModelConfig, parallel: ParallelContext, ops: Ops, placements: Placements | None = None
    ) -> None:
        super().__init__()
        self.config, self.parallel, self.ops = config, parallel, ops
        placements = placements or even_placements(config, parallel.ep.size)
        self.overflow = OverflowFlag()
        stage, tied = parallel.pipeline, config.tie_word_embeddings
        if stage.is_first or (stage.is_last and tied):
            self.tok_emb = VocabParallelEmbedding(config.vocab_size, config.emb_dim, parallel.tp, ops)
        self.blocks = nn.ModuleList(  # type: ignore[assignment]
            TransformerBlock(config, layer, parallel, placements.get(layer), ops, self.overflow)
            for layer in parallel.layout.layers_of(stage.index, config.n_layers)
        )
        if stage.is_last:
            self.final_norm = RMSNorm(config, config.emb_dim, ops)
            self.out_head = VocabParallelHead(config.emb_dim, config.vocab_size, parallel.tp, ops)
            if tied:
                self.out_head.weight = self.tok_emb.weight
            if config.has_score:
                self.score = nn.Parameter(torch.empty(1, config.emb_dim))
        self._rope = RopeTables(config)

    def forward(self, batch: StepBatch, cache: list[LayerCache]) -> tuple[Tensor | None, Tensor | None]:
        """Returns hidden states [T, D] and logits [L, V] of `batch.logits_rows`. Both are None on earlier stages and
        without tokens; logits are None on tp ranks other than 0."""
        tokens, stage = len(batch.token_ids), self.parallel.pipeline
        if not tokens:
            x = self.activation_template.new_empty(0, self.config.emb_dim)
            for block in self.blocks:
                block.feed_forward(x, x, batch)  # no tokens here; still join the experts' collectives
            return None, None
        arrived = None if stage.is_first else stage.receive(tokens, self.activation_template)
        x, logits = self.stage(batch, cache, arrived)
        if stage.is_last:
            return x, logits
        stage.send(x)
        return None, None

    def stage(
        self, batch: StepBatch, cache: list[LayerCache], arrived: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns this stage's hidden states [T, D], and logits [L, V] on tp rank 0 of the last stage. `arrived`
        [T, D] is what the stage before sent, None on the first."""
        x = self.tok_emb(batch.token_ids) if arrived is None else arrived
        if batch.padding is not None and self.parallel.dp.size > 1 and not batch.all_to_all:
            batch = replace(batch, padding=self.parallel.dp.all_gather(batch.padding))
        cos, sin = self._rope.rows(batch.positions, max(batch.host_context_lens), x.dtype)
        done = self.whole_stage(x, cos, sin, cache, batch) if self.whole_stage is not None else None
        if done is not None:
            x, own_logits = done
            return x, None if own_logits is None else self.out_head.gathered(own_logits)
        for block, layer_cache in zip(self.blocks, cache, strict=True):
            x = block(x, cos, sin, layer_cache, batch)
        return x, self.logits(x[batch.logits_rows]) if self.parallel.pipeline.is_last else None

    def logits(self, x: Tensor) -> Tensor | None:
        """Rows of the last block's output [L, D] -> logits [L, V] on tp rank 0, None on others. All ranks of the stage
        call it."""
        return self.out_head(self.final_norm(x))  # type: ignore[no-any-return]

    def take_overflow(self) -> Tensor:
        """[1] fp32, more than 0 if an exchange of experts' rows since the last call exceeded its capacity on a rank of
        this stage; these steps' results must be discarded. All ranks of the stage call it."""
        return self.overflow.reduce_and_clear(self.parallel.tp, self.parallel.dp)

    @property
    def moe_layers(self) -> dict[int, MoEFeedForward]:
        """The mixtures of experts of this stage, by layer."""
        return {block.layer: block.ff for block in self.blocks if isinstance(block.ff, MoEFeedForward)}

    @property
    def activation_template(self) -> Tensor:
        """[D], of the device and dtype that this rank's activations have."""
        return self.blocks[0].norm1.scale

    @property
    def device(self) -> torch.device:
        return self.activation_template.device

    @property
    def cache_dtype(self) -> torch.dtype:
        """The dtype of the KV cache."""
        return self.kv_cache_dtype or self.dtype

    @property
    def dtype(self) -> torch.dtype:
        return self.activation_template.dtype
