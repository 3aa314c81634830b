"""Reads the settings of weights in e2m1 codes, two in a byte: NVFP4 (scales in e4m3 for 16 inputs, and one for the
tensor) and MXFP4 (powers of two for 32 inputs), of compressed-tensors and of NVIDIA's ModelOpt; and ModelOpt's FP8."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

from qwen3_dist.config_checks import check, check_keys, strings
from qwen3_dist.errors import CheckpointError
from qwen3_dist.kv_cache_dtype import kv_cache_scheme
from qwen3_dist.quantization import FP4, FP8, Packing, Quantization, Stored, WeightFormat

FP4_FORMATS = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
_MODELOPT_FP8 = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")
_CODES, _POWERS = Packing(4, "uint8"), Packing(8, "powers")
_MODELOPT_KEYS = {
    "quant_method", "quant_algo", "config_groups", "ignore", "exclude_modules", "group_size", "producer",
    "kv_cache_scheme", "kv_cache_quant_algo",
}  # fmt: skip


def fp4_format(name: str, weights: Mapping[str, Any], form: str) -> WeightFormat:
    """The weights of a group of compressed-tensors. Raises CheckpointError if they are not of the format `form`."""
    size = 16 if form == "nvfp4-pack-quantized" else 32
    found = (weights.get("num_bits"), weights.get("type"), weights.get("group_size"))
    if found != (4, "float", size) or not weights.get("symmetric", True):
        raise CheckpointError(
            f"{name} has {form} weights that are not symmetric 4-bit floats by groups of {size}"
        )
    scale = Stored(("weight_scale",), None if size == 16 else _POWERS)
    factor = Stored(("weight_global_scale",)) if size == 16 else None
    return WeightFormat(FP4, (1, size), scale, Stored(("weight_packed",), _CODES), factor=factor)


def read_modelopt(config: Mapping[str, Any]) -> Quantization:
    """Raises CheckpointError if the settings are not those of NVFP4 or of FP8 by outputs or tensors."""
    check_keys(config, _MODELOPT_KEYS)
    check(config, "quant_algo", ("NVFP4", *_MODELOPT_FP8), f"NVFP4, {' and '.join(_MODELOPT_FP8)} are")
    if config["quant_algo"] == "NVFP4":
        check(config, "group_size", (None, 16), "groups of 16 inputs are")
    ignored = [*strings(config, "ignore"), *strings(config, "exclude_modules")]
    ignored = [f"re:{fnmatch.translate(each)}" if "*" in each else each for each in ignored]
    stored = WeightFormat(
        FP4,
        (1, 16),
        scale=Stored(("weight_scale",)),
        weight=Stored(("weight",), _CODES),
        factor=Stored(("weight_scale_2",)),
        factor_multiplies=True,
    )
    if config["quant_algo"] in _MODELOPT_FP8:
        stored = WeightFormat(FP8, None, Stored(("weight_scale",)))
    groups = ((stored, ("Linear",)),)
    return Quantization("modelopt", groups, tuple(ignored), kv_cache=kv_cache_scheme(config))
