"""Exact sizes of a model: parameters, bytes per rank of a layout, KV-cache bytes per token."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

from qwen3_dist.config import ModelConfig
from qwen3_dist.kv_cache_dtype import FP8_CACHE, kv_cache_dtype
from qwen3_dist.layout import Layout, valid_layouts
from qwen3_dist.quantization import NIBBLES
from qwen3_dist.weights.pieces import COMPANIONS, DIVISOR, MULTIPLIER, ORDER, SCALE, Piece
from qwen3_dist.weights.weight_plan import WeightPlan

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class _Sizes(NamedTuple):
    """Sums over the pieces of the checkpoint that a rank reads. By kind, a key of `_KINDS`: matrices alone."""

    weights: int
    expert_weights: int
    stored_bytes: int
    weights_by_kind: dict[str, int]
    bytes_by_kind: dict[str, int]


_KINDS = {
    "attention": ".att.",
    "experts": ".ff.experts.",
    "dense": ".ff.fc",
}  # what names of parameters contain


@lru_cache(maxsize=256)
def _sizes(config: ModelConfig, layout: Layout, rank: int) -> _Sizes:
    weights, stored = Counter[str](), Counter[str]()
    all_weights = expert_weights = stored_bytes = 0
    for piece in WeightPlan(config, layout, set()).pieces(layout.coords(rank)):
        elements = prod(map(len, piece.ranges))
        own = 0 if piece.stored in COMPANIONS else elements
        taken = _bytes(piece, elements, config)
        kind = next((kind for kind, part in _KINDS.items() if part in piece.parameter), None)
        all_weights += own
        expert_weights += own * (kind == "experts")
        stored_bytes += taken
        if kind is not None and len(piece.shape) > 1:
            weights[kind] += own
            stored[kind] += taken
    return _Sizes(all_weights, expert_weights, stored_bytes, dict(weights), dict(stored))


def total_parameters(config: ModelConfig) -> int:
    """Number of parameters of the whole model. A tied head counts once."""
    return rank_parameters(config, Layout(), 0)


def active_parameters(config: ModelConfig) -> int:
    """Number of parameters used for one token: all but the experts that it is not routed to."""
    experts = _sizes(config, Layout(), 0).expert_weights
    share = config.num_experts_per_tok / config.num_experts if config.num_experts else 0
    return total_parameters(config) - experts + round(experts * share)


def rank_parameters(config: ModelConfig, layout: Layout, rank: int) -> int:
    """Number of parameters on `rank`, without padding."""
    return _sizes(config, layout, rank).weights


def rank_bytes(config: ModelConfig, layout: Layout, rank: int) -> int:
    """Bytes of weights on `rank`, without padding. What belongs to the codes of a quantised checkpoint
    is counted."""
    return _sizes(config, layout, rank).stored_bytes


def bytes_per_weight(config: ModelConfig) -> dict[str, float]:
    """Bytes of a weight of "attention", "dense" layers and "experts", scales included: the mean over all layers."""
    sizes = _sizes(config, Layout(), 0)
    return {kind: sizes.bytes_by_kind[kind] / weights for kind, weights in sizes.weights_by_kind.items()}


def kv_item_bytes(config: ModelConfig, setting: str = "auto") -> int:
    """Bytes of a number in the KV cache, by the setting `kv_cache_dtype`. Raises what that raises."""
    name = kv_cache_dtype(setting, config.dtype, config.quantization)
    return 1 if name == FP8_CACHE else ITEM_BYTES[name]


def kv_bytes_per_token(config: ModelConfig, layout: Layout, rank: int, item_bytes: int) -> int:
    """KV-cache bytes per token on `rank`: K and V of its KV groups in the layers of its stage."""
    groups = max(1, config.n_kv_groups // layout.tp)
    layers = layout.layers_of(layout.coords(rank).stage, config.n_layers)
    return 2 * len(layers) * groups * config.head_dim * item_bytes


# Name in config.json: field of ModelConfig.
_SIZES = {
    "num_hidden_layers": "n_layers",
    "hidden_size": "emb_dim",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_groups",
    "head_dim": "head_dim",
    "intermediate_size": "hidden_dim",
    "vocab_size": "vocab_size",
}
_MOE_SIZES = {
    "num_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "moe_intermediate_size": "moe_hidden_dim",
}


def inspect_model(
    name: str, config: ModelConfig, layout: Layout, world: int, kv_cache: str = "auto"
) -> dict[str, Any]:
    """The report of `qwen3-dist inspect`; `kv_cache` is the setting `kv_cache_dtype`. Raises ParallelLayoutError if
    `layout` does not fit the model, and ConfigError or CheckpointError for a KV cache that is not supported."""
    layout.validate(config)
    item_bytes = kv_item_bytes(config, kv_cache)
    names = {**_SIZES, **(_MOE_SIZES if config.num_experts else {}), "context_length": "context_length"}
    ranks = range(layout.world)
    kv = [kv_bytes_per_token(config, layout, rank, item_bytes) for rank in ranks]
    one_group = [rank for rank in ranks if layout.coords(rank).group == 0]
    return {
        "model": name,
        "dtype": config.dtype,
        "quantization": config.quantization.describe() if config.quantization is not None else "none",
        "kv_cache_dtype": kv_cache_dtype(kv_cache, config.dtype, config.quantization),
        "sizes": {known: getattr(config, field) for known, field in names.items()},
        "parameters": total_parameters(config),
        "active_parameters_per_token": active_parameters(config),
        "layout": str(layout),
        "bytes_per_rank": [rank_bytes(config, layout, rank) for rank in ranks],
        "kv_bytes_per_token_per_rank": kv,
        "kv_bytes_per_token": sum(kv[rank] for rank in one_group),
        "world": world,
        "valid_layouts": [str(each) for each in valid_layouts(config, world)],
    }


def _bytes(piece: Piece, elements: int, config: ModelConfig) -> int:
    if piece.stored in NIBBLES:
        *rows, inputs = map(len, piece.ranges)
        return prod(rows) * -(-inputs // 2)
    sizes = {None: ITEM_BYTES[config.dtype], SCALE: 4, ORDER: 4, DIVISOR: 0, MULTIPLIER: 0}
    return elements * sizes.get(piece.stored, 1)
