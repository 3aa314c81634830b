"""Weights per rank in closed form, fast enough to compare thousands of layouts. `memory` counts them exactly."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.planning.memory import bytes_per_weight
from qwen3_dist.config import ModelConfig
from qwen3_dist.layout import Layout, even_ranges


@dataclass(frozen=True)
class Stage:
    """A pipeline stage: its layers by kind, and whether it has the embedding (first) or the head (last)."""

    dense_layers: int
    moe_layers: int
    first: bool
    last: bool

    @property
    def layers(self) -> int:
        return self.dense_layers + self.moe_layers


@dataclass(frozen=True)
class LayerSizes:
    """Weights of one layer on the fullest rank, in elements by operation, and the dimensions they follow from."""

    attention: int  # W_query, W_key, W_value, out_proj
    dense: int  # fc1, fc2, fc3
    gate: int
    expert: int  # fc1, fc2, fc3 of one expert, its columns on this rank
    experts_here: int
    heads: int  # of this rank
    kv_groups: int  # of this rank
    dense_columns: int
    expert_columns: int
    small: int  # norms and biases

    @classmethod
    def of(cls, config: ModelConfig, layout: Layout) -> LayerSizes:
        dim, size = config.emb_dim, config.head_dim
        heads, groups = config.n_heads // layout.tp, max(1, config.n_kv_groups // layout.tp)
        dense = -(-config.hidden_dim // layout.tp)
        columns = -(-config.moe_hidden_dim // layout.etp) if config.num_experts else 0
        biases = (heads + 2 * groups) * size + dim if config.attention_bias else 0
        norms = (2 * dim + (2 * size if config.qk_norm else 0)) * (2 if config.rms_norm_shift else 1)
        return cls(
            attention=(2 * heads + 2 * groups) * size * dim,
            dense=3 * dense * dim,
            gate=config.num_experts * dim,
            expert=3 * columns * dim,
            experts_here=-(-config.num_experts // layout.ep),
            heads=heads,
            kv_groups=groups,
            dense_columns=dense,
            expert_columns=columns,
            small=norms + biases,
        )


def stages(config: ModelConfig, layout: Layout) -> list[Stage]:
    """The pipeline stages in order."""
    cuts = even_ranges(config.n_layers, layout.pp)
    moe = [sum(config.is_moe_layer(layer) for layer in cut) for cut in cuts]
    return [
        Stage(len(cut) - experts, experts, index == 0, index == layout.pp - 1)
        for index, (cut, experts) in enumerate(zip(cuts, moe, strict=True))
    ]


def stage_bytes(
    config: ModelConfig, layout: Layout, sizes: LayerSizes, stage: Stage, item_bytes: float
) -> float:
    """Bytes of weights on the fullest rank of `stage`, where a weight that is not quantised takes `item_bytes`."""
    plain = stage_weights(config, layout, sizes, stage) * item_bytes
    if config.quantization is None:
        return plain
    saved = {kind: item_bytes - stored for kind, stored in bytes_per_weight(config).items()}
    return plain - (
        stage.layers * sizes.attention * saved["attention"]
        + stage.dense_layers * sizes.dense * saved.get("dense", 0)
        + stage.moe_layers * sizes.experts_here * sizes.expert * saved.get("experts", 0)
    )


def stage_weights(config: ModelConfig, layout: Layout, sizes: LayerSizes, stage: Stage) -> int:
    """Weights on the fullest rank of `stage`, in elements, padding included."""
    vocabulary = -(-config.vocab_size // layout.tp) * config.emb_dim
    tables = int(stage.first) + int(stage.last)
    if stage.first and stage.last and config.tie_word_embeddings:
        tables = 1
    experts = sizes.gate + sizes.experts_here * sizes.expert
    final_norm = config.emb_dim * (2 if config.rms_norm_shift else 1) if stage.last else 0
    layers = stage.layers * (sizes.attention + sizes.small) + stage.dense_layers * sizes.dense
    return layers + stage.moe_layers * experts + tables * vocabulary + final_norm
