"""Which models are supported, by what config.json says of their kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen3_dist.config_checks import strings
from qwen3_dist.errors import CheckpointError, ConfigError

MODEL_TYPES = ("qwen3", "qwen3_moe")
# Other settings that change a model's outputs: the supported values, and advice for others.
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish"), "Qwen3 uses 'silu'"),
    "is_causal": ((True, None), "only causal attention is"),
    "use_bidirectional_attention": ((False, None), "only causal attention is"),
    "dual_chunk_attention_config": ((None, {}), "use the config.json without it, or YaRN"),
}
_SCORING = ("Qwen3ForSequenceClassification", "Qwen3MoeForSequenceClassification")
_ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Qwen3Model", "Qwen3MoeModel", *_SCORING)


def refuse_unsupported(raw: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a model that is not supported, and ConfigError for one that is contradicted."""
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES and not (model_type is None and "emb_dim" in raw):
        raise CheckpointError(
            f"model_type {model_type!r} is not supported; this service runs "
            f"{' and '.join(MODEL_TYPES)} checkpoints"
        )
    architectures = raw.get("architectures")
    if architectures and not set(_ARCHITECTURES) & set(strings(raw, "architectures")):
        raise CheckpointError(
            f"architecture {architectures[0]!r} is not supported; this service runs "
            f"{', '.join(_ARCHITECTURES)}"
        )
    for name, (allowed, advice) in _ONLY.items():
        if raw.get(name, allowed[0]) not in allowed:
            raise CheckpointError(f"{name} {raw[name]!r} is not supported; {advice}")
    experts = [raw[name] for name in ("num_experts", "num_local_experts") if raw.get(name) is not None]
    if experts[1:] and experts[0] != experts[1]:
        raise ConfigError(
            f"num_experts and num_local_experts disagree: {raw['num_experts']} and "
            f"{raw['num_local_experts']}; keep one of them in config.json"
        )


def has_score(raw: Mapping[str, Any]) -> bool:
    """Whether the model is a reranker with a score head. Raises CheckpointError for a classifier of several labels."""
    if not set(_SCORING) & set(raw.get("architectures") or ()):
        return False
    names = raw.get("id2label")
    labels = raw.get("num_labels", len(names) if names and isinstance(names, Mapping | list) else 2)
    if labels != 1:
        raise CheckpointError(
            f"a classifier of {labels} labels is not supported; rerankers have a single score"
        )
    return True
