"""Finds the `ModelConfig` that a name or path stands for, without any weights: a plan needs nothing else."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from qwen3_dist.config import ModelConfig
from qwen3_dist.errors import CheckpointError
from qwen3_dist.weights.source import bundled_path, local_path


@cache
def official_configs() -> dict[str, dict[str, Any]]:
    """`config.json` of the official sizes by name; shapes only, the checkpoint's own file is the truth."""
    table: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("official.json").read_text())
    return table


def find_config(model: str) -> tuple[str, ModelConfig]:
    """The name to show and the config of `model`.

    That is "" or `bundled`, a directory, a `config.json`, an official name such as Qwen3-235B-A22B, or
    another hub id, of which the config alone is downloaded. Raises CheckpointError if it is none of them.
    """
    if model in ("", "bundled"):
        return "bundled", ModelConfig.from_directory(bundled_path())
    path = local_path(model)
    if path.is_dir():
        return str(path), ModelConfig.from_directory(path)
    if path.is_file():
        return str(path), _from_file(path)
    short = model.removeprefix("Qwen/").lower()
    for name, raw in official_configs().items():
        if name.lower() == short:
            return name, ModelConfig.from_dict(raw)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith("."):
        return model, _from_file(_from_hub(model))
    raise CheckpointError(
        f"{model} is no directory, config.json or hub id, and the official sizes are "
        f"{', '.join(official_configs())}"
    )


def _from_file(file: Path) -> ModelConfig:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} must hold a JSON object")
    return ModelConfig.from_dict(raw)


def _from_hub(model: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(hf_hub_download(model, "config.json"))
    except RepositoryNotFoundError:
        raise CheckpointError(f"the hub has no model {model!r}, or it needs a login; check the id") from None
    except (EntryNotFoundError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{model!r} is no directory here, not in the local hub cache, and the hub does not give its "
            f"config.json ({type(error).__name__}); give the path of a config.json"
        ) from None
