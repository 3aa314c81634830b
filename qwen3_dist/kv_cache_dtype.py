"""The dtype of the KV cache, by the setting and by what a quantised checkpoint says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen3_dist.errors import CheckpointError, ConfigError
from qwen3_dist.quantization import Quantization

FP8_CACHE = "fp8"


def kv_cache_dtype(setting: str, compute: str, quantization: Quantization | None) -> str:
    """FP8_CACHE, or the name of another dtype: by the setting `kv_cache_dtype`, the compute dtype and the checkpoint's
    quantisation.

    Raises ConfigError if the setting does not go with the compute dtype, and CheckpointError for "auto" if the
    checkpoint was made for a cache of another kind.
    """
    if setting in ("fp8", "fp8_e4m3"):
        return FP8_CACHE
    if setting == "bfloat16":
        if compute != "bfloat16":
            raise ConfigError(
                f"kv_cache_dtype=bfloat16 needs dtype=bfloat16, and the compute dtype is {compute}; use auto or fp8"
            )
        return compute
    scheme = quantization.kv_cache if quantization is not None else None
    if scheme not in (None, FP8_CACHE):
        raise CheckpointError(
            f"the checkpoint was made for a KV cache of {scheme}, which is not supported; set kv_cache_dtype to fp8 "
            "or bfloat16"
        )
    return scheme or compute


def kv_cache_scheme(config: Mapping[str, Any]) -> str | None:
    """The kind of KV cache that a quantization_config asks for, in the spellings of compressed-tensors and ModelOpt:
    FP8_CACHE, words for a kind that is not supported, or None."""
    scheme = config.get("kv_cache_scheme") or config.get("kv_cache_quant_algo")
    if not scheme:
        return None
    if not isinstance(scheme, Mapping):
        return FP8_CACHE if str(scheme).upper() == "FP8" else repr(scheme)
    found = (scheme.get("num_bits"), scheme.get("type"), scheme.get("dynamic") or False)
    static = found == (8, "float", False) and scheme.get("symmetric", True)
    return (
        FP8_CACHE
        if static and scheme.get("strategy", "tensor") in ("tensor", "attn_head")
        else repr(dict(scheme))
    )
