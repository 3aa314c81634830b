"""`ModelConfig`, the shape and numerics of a model, read from `config.json` in either spelling.

Field names are those of the reference architecture (`emb_dim`, `n_kv_groups`, ...). HuggingFace's names
(`hidden_size`, `num_key_value_heads`, ...) are translated here and nowhere else.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from qwen3_dist.config_checks import check_integer
from qwen3_dist.config_fields import NO_EFFECT, READ
from qwen3_dist.errors import CheckpointError, ConfigError
from qwen3_dist.hf_overrides import HfOverrides
from qwen3_dist.quantization import ROUNDS_TO, Quantization
from qwen3_dist.quantization_config import read_quantization
from qwen3_dist.quantization_files import with_quantization
from qwen3_dist.rope_scaling import DEFAULT_BASE, RopeScaling, read_rope
from qwen3_dist.supported_models import has_score, refuse_unsupported

# The least value of each size, and the most, which no model comes near: plans are made of all layers and experts.
_LEAST = {
    **dict.fromkeys(("vocab_size", "emb_dim", "n_layers", "n_heads", "n_kv_groups", "head_dim"), 1),
    **dict.fromkeys(("context_length", "decoder_sparse_step"), 1),
    **dict.fromkeys(("hidden_dim", "moe_hidden_dim", "num_experts", "num_experts_per_tok"), 0),
}
_MOST, _MOST_OF_OTHERS = {"n_layers": 4096, "n_heads": 65536, "num_experts": 65536}, 2**31 - 1
DTYPES = ("float32", "bfloat16", "float16")

# HuggingFace's key -> ours. Where two spellings exist the later transformers one comes second.
_HF_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "emb_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_groups",
    "head_dim": "head_dim",
    "max_position_embeddings": "context_length",
    "intermediate_size": "hidden_dim",
    "moe_intermediate_size": "moe_hidden_dim",
    "num_experts": "num_experts",
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "torch_dtype": "dtype",
    "dtype": "dtype",
    "norm_topk_prob": "norm_topk_prob",
    "mlp_only_layers": "mlp_only_layers",
    "decoder_sparse_step": "decoder_sparse_step",
    "tie_word_embeddings": "tie_word_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "attention_bias": "attention_bias",
    "sliding_window": "sliding_window",
}
# Defaults of transformers' Qwen3Config / Qwen3MoeConfig for missing keys.
_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "qwen3_moe": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
}


_HF_MAY_BE_NULL = ("num_key_value_heads", "head_dim", "sliding_window")


@dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of one Qwen3 checkpoint, dense (`num_experts == 0`) or MoE."""

    vocab_size: int
    emb_dim: int
    n_layers: int
    n_heads: int
    n_kv_groups: int
    head_dim: int
    hidden_dim: int
    context_length: int = 40960
    moe_hidden_dim: int = 0
    num_experts: int = 0
    num_experts_per_tok: int = 0
    dtype: str = "bfloat16"
    rope_base: float = 1_000_000.0
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = True
    norm_topk_prob: bool = False
    mlp_only_layers: tuple[int, ...] = ()
    decoder_sparse_step: int = 1
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-6
    rms_norm_shift: bool = False
    qwen3_compatible: bool = True
    attention_bias: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()
    has_score: bool = False  # a score head in place of the output head: a reranker that cannot generate
    quantization: Quantization | None = None  # of a checkpoint with quantised weights

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            check_integer(name, getattr(self, name), least, _MOST.get(name, _MOST_OF_OTHERS))
        self._check_numerics()
        if self.n_heads % self.n_kv_groups:
            raise ConfigError(f"n_heads={self.n_heads} is not a multiple of n_kv_groups={self.n_kv_groups}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} must be even for rotary embeddings")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ConfigError(
                f"num_experts_per_tok={self.num_experts_per_tok} must lie between 1 and "
                f"num_experts={self.num_experts}"
            )
        if self.num_experts and self.moe_hidden_dim < 1 and any(map(self.is_moe_layer, range(self.n_layers))):
            raise ConfigError("moe_hidden_dim must be positive when there are experts")
        if self.hidden_dim < 1 and not all(map(self.is_moe_layer, range(self.n_layers))):
            raise ConfigError("hidden_dim must be positive when there are layers without experts")

    def _check_numerics(self) -> None:
        for name in ("qk_norm", "norm_topk_prob", "tie_word_embeddings", "attention_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, not {getattr(self, name)!r}")
        for name in ("rms_norm_eps", "rope_base"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
                raise ConfigError(f"{name} must be a positive number, not {value!r}")
        if any(not isinstance(layer, int) or isinstance(layer, bool) for layer in self.mlp_only_layers):
            raise ConfigError(f"mlp_only_layers must be a list of layers, not {list(self.mlp_only_layers)!r}")
        if self.sliding_window is not None and not (
            isinstance(self.sliding_window, int) and self.sliding_window > 0
        ):
            raise ConfigError(f"sliding_window must be a positive integer, not {self.sliding_window!r}")

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` routes to experts (the rule of transformers' Qwen3-MoE)."""
        return (
            self.num_experts > 0
            and layer not in self.mlp_only_layers
            and (layer + 1) % self.decoder_sparse_step == 0
        )

    def window_of_layer(self, layer: int) -> int | None:
        """Sliding-window length of `layer`, or None for full attention."""
        return self.sliding_window if layer in self.sliding_layers else None

    def rounded(self, quantize: str) -> ModelConfig:
        """This model with the codes that the setting `quantize` makes of its weights as they are read; int8 is made of
        the weights in memory, and is no part of a model's config.

        Raises ConfigError if the checkpoint's weights are quantised already.
        """
        if quantize != "none" and self.quantization is not None:
            raise ConfigError(
                f"quantize={quantize} rounds bf16, fp16 or fp32 weights, and this checkpoint's are quantised already "
                f"({self.quantization.method}); leave quantize out"
            )
        return replace(self, quantization=ROUNDS_TO[quantize]) if quantize in ROUNDS_TO else self

    @classmethod
    def from_directory(cls, path: str | Path, overrides: HfOverrides | None = None) -> ModelConfig:
        """Reads `path`/config.json with `overrides` in place of its own fields. If it does not tell how weights are
        quantised, a file beside it may.

        Raises CheckpointError if the file is missing or unreadable, and what `from_dict` raises.
        """
        return cls.from_dict(with_quantization(_read_json(path), Path(path)), overrides)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], overrides: HfOverrides | None = None) -> ModelConfig:
        """Builds a config from the keys of a HuggingFace `config.json` or of the reference architecture, with
        `overrides` in place of its own fields.

        Raises CheckpointError for an unsupported `model_type`, quantisation, activation or RoPE type, and ConfigError
        for invalid values and for an override that is no field that is read.
        """
        if overrides is not None and overrides.text:
            given, raw = raw, overrides.applied(raw)
            for name in raw:
                if raw[name] != given.get(name) and name not in _names_read(given):
                    raise ConfigError(
                        f"hf_overrides names {name!r}, which this service does not read; leave it out"
                    )
        refuse_unsupported(raw)
        values = _reference_values(raw) if "emb_dim" in raw else _huggingface_values(raw)
        values["quantization"] = read_quantization(raw)
        required = ("vocab_size", "emb_dim", "n_layers", "n_heads", "n_kv_groups", "hidden_dim")
        missing = [name for name in required if values.get(name) is None]
        if missing:
            raise ConfigError(f"config.json lacks {', '.join(missing)}")
        if values.get("head_dim") is None:
            values["head_dim"] = 0
            with contextlib.suppress(TypeError, ZeroDivisionError):  # the checks name the size that is wrong
                values["head_dim"] = values["emb_dim"] // values["n_heads"]
        values["dtype"] = str(values.get("dtype") or "bfloat16").removeprefix("torch.")
        dense = values.get("mlp_only_layers")
        values["mlp_only_layers"] = (
            tuple(dense) if isinstance(dense, list | tuple) else (dense,) if dense else ()
        )
        if values["rope_scaling"] is not None:
            values["context_length"] = values["rope_scaling"].context_length
        if has_score(raw):  # there is no output head: none is loaded where it is tied to the embedding
            values.update(has_score=True, tie_word_embeddings=True)
        if not values.get("num_experts"):
            values.update(num_experts=0, num_experts_per_tok=0, moe_hidden_dim=0)
        return cls(**{name: value for name, value in values.items() if value is not None})


def fields_not_understood(path: str | Path) -> list[str]:
    """The fields of `path`/config.json that may change the model's outputs and that no rule here covers. A field that
    is null changes nothing. Raises CheckpointError if the file is missing or unreadable."""
    raw = _read_json(path)
    known = _names_read(raw) | NO_EFFECT
    return sorted(name for name, value in raw.items() if value is not None and name not in known)


def _names_read(raw: Mapping[str, Any]) -> set[str]:
    """The names of all fields that are read, in the spelling of the config.json `raw`."""
    if "emb_dim" in raw:
        return {field.name for field in fields(ModelConfig)} | READ - {"rope_theta"}
    return READ | _HF_KEYS.keys()


def _read_json(path: str | Path) -> dict[str, Any]:
    file = Path(path) / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no config.json, so it is not a checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} must hold a JSON object")
    return raw


def _reference_values(raw: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(ModelConfig)}
    values = {name: value for name, value in raw.items() if name in names}
    values["rope_base"], values["rope_scaling"] = read_rope(
        raw, raw.get("rope_base"), raw.get("context_length")
    )
    values.setdefault("norm_topk_prob", True)  # the reference renormalises: top-k, then softmax
    values.setdefault("tie_word_embeddings", False)
    return values


def _huggingface_values(raw: Mapping[str, Any]) -> dict[str, Any]:
    moe = raw["model_type"] == "qwen3_moe"
    raw = {name: value for name, value in raw.items() if value is not None or name in _HF_MAY_BE_NULL}
    if moe and "num_experts" not in raw and "num_local_experts" not in raw:
        raw = {**raw, "num_experts": 128}
    raw = {**_HF_DEFAULTS[raw["model_type"]], **raw}
    values = {ours: raw[theirs] for theirs, ours in _HF_KEYS.items() if theirs in raw}
    base, values["rope_scaling"] = read_rope(raw, raw.get("rope_theta"), raw["max_position_embeddings"])
    values["rope_base"] = DEFAULT_BASE if base is None else base
    if values.get("n_kv_groups") is None:
        values["n_kv_groups"] = values["n_heads"]
    values["sliding_layers"] = _sliding_layers(raw, moe)
    if not values["sliding_layers"]:
        values["sliding_window"] = None
    if not moe:
        values["num_experts"] = 0
    return values


def _sliding_layers(raw: Mapping[str, Any], moe: bool) -> tuple[int, ...]:
    """The layers with a sliding window: all layers of Qwen3-MoE, those of `layer_types` in dense Qwen3."""
    n_layers, full = raw["num_hidden_layers"], 0 if moe else raw["max_window_layers"]
    if not isinstance(n_layers, int) or not isinstance(full, int):
        raise ConfigError(
            f"num_hidden_layers and max_window_layers must be integers, not {n_layers!r} and {full!r}"
        )
    slides = bool(raw.get("use_sliding_window") and raw.get("sliding_window"))
    usual = tuple(range(n_layers)[full:]) if slides else ()
    kinds = raw.get("layer_types")
    if not kinds:
        return usual
    if (
        not isinstance(kinds, list | tuple)
        or len(kinds) != n_layers
        or any(kind not in ("full_attention", "sliding_attention") for kind in kinds)
    ):
        raise CheckpointError(
            f"layer_types must name full_attention or sliding_attention for each of {n_layers} layers"
        )
    named = tuple(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")
    if named != usual and (moe or not slides):
        raise CheckpointError(
            "layer_types disagree with use_sliding_window about the layers that slide; correct config.json"
        )
    return named
