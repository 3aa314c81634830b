"""Finds the `ModelConfig` of a model name or path without its weights, which planning does not need."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from qwen3_dist.config import ModelConfig
from qwen3_dist.errors import CheckpointError
from qwen3_dist.hf_overrides import HfOverrides
from qwen3_dist.quantization import INT8, Quantization, Stored, WeightFormat
from qwen3_dist.quantization_files import with_quantization
from qwen3_dist.weights.source import canonical_name, local_path, resolve_config

_INT8 = Quantization(
    "int8", ((WeightFormat(INT8, None, Stored(("weight_scale",))), ("Linear",)),), rounds=True
)


def _fp4(form: str, size: int) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": size}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


_FP8_OF_OUTPUTS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
    },
    "ignore": ["lm_head"],
}

# `quantization_config` of the checkpoints whose names end so: Qwen's own, and in others' formats.
_QUANTIZED: dict[str, dict[str, Any]] = {
    "FP8": {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]},
    "FP8-dynamic": _FP8_OF_OUTPUTS,
    "AWQ": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
    "GPTQ-Int4": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True},
    "GPTQ-Int8": {"quant_method": "gptq", "bits": 8, "group_size": 128, "sym": True},
    "NVFP4": _fp4("nvfp4-pack-quantized", 16),
    "MXFP4": _fp4("mxfp4-pack-quantized", 32),
}


@cache
def official_configs() -> dict[str, dict[str, Any]]:
    """Shapes of the official sizes: the relevant fields of their config.json, by name."""
    table: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("official.json").read_text())
    return table


def find_config(
    model: str, revision: str | None = None, overrides: HfOverrides | None = None
) -> tuple[str, ModelConfig]:
    """The display name and the config of `model`, with `overrides` in place of fields of its config.json.

    `model` is anything that `resolve_model` accepts, or the path of a config.json. The configs of official names come
    with this package; for other hub ids only the config is downloaded, at `revision`. Raises CheckpointError and what
    `ModelConfig.from_dict` raises.
    """
    path = local_path(model)
    if model and path.is_file():
        return model, ModelConfig.from_dict(with_quantization(_from_file(path), path.parent), overrides)
    name = canonical_name(model)
    official = None if revision or local_path(name).is_dir() else _official(name)
    if official is not None:
        return official[0], ModelConfig.from_dict(official[1], overrides)
    try:
        directory = resolve_config(name, revision)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; models that need no download are {', '.join(official_configs())}"
        ) from None
    return name or "bundled", ModelConfig.from_directory(directory, overrides)


def planned(config: ModelConfig, quantize: str) -> ModelConfig:
    """`config` as the setting `quantize` makes its weights. With int8 they are codes only after loading, of which a
    config tells nothing otherwise; the head, which is then int8 too, is counted as it was.

    Raises ConfigError if the checkpoint's weights are quantised already.
    """
    rounded = config.rounded(quantize)
    return replace(rounded, quantization=_INT8) if quantize == "int8" else rounded


def _official(name: str) -> tuple[str, dict[str, Any]] | None:
    """The official name that is meant by a model name or hub id, ignoring case, and its config.json; None if there is
    none. A quantised checkpoint of a model has its name, a dash, and one of `_QUANTIZED`."""
    short = name.lower().removeprefix("qwen/")
    for each, raw in official_configs().items():
        if short == each.lower():
            return each, raw
        for ending, settings in _QUANTIZED.items():
            if short == f"{each}-{ending}".lower():
                return f"{each}-{ending}", {**raw, "quantization_config": settings}
    return None


def _from_file(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} cannot be read as JSON ({error}); give a directory or its config.json"
        ) from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} must hold a JSON object")
    return raw
