"""Finds the `ModelConfig` of a model name or path without its weights, which planning does not need."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from qwen3_dist.config import ModelConfig
from qwen3_dist.errors import CheckpointError
from qwen3_dist.hf_overrides import HfOverrides
from qwen3_dist.weights.source import canonical_name, local_path, resolve_config

_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}


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
        return model, ModelConfig.from_dict(_from_file(path), overrides)
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


def _official(name: str) -> tuple[str, dict[str, Any]] | None:
    """The official name that is meant by a model name or hub id, ignoring case, and its config.json; None if there is
    none. The FP8 checkpoint of a model has its name and "-FP8"."""
    short = name.lower().removeprefix("qwen/")
    for each, raw in official_configs().items():
        if short == each.lower():
            return each, raw
        if short == f"{each.lower()}-fp8":
            return f"{each}-FP8", {**raw, "quantization_config": _FP8}
    return None


def _from_file(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} must hold a JSON object")
    return raw
