"""What is checked of a model before anything starts, by its config.json. Imports no Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from qwen3_dist.config import ModelConfig
from qwen3_dist.engine.request_checks import check_context
from qwen3_dist.errors import QwenDistError
from qwen3_dist.text.sidecars import read_eos_token_ids, read_generation_defaults
from qwen3_dist.weights.lora_loader import open_adapters
from qwen3_dist.weights.source import config_at_hand, resolve_config
from serve_app.settings import ModelSettings

T = TypeVar("T")


def check_each(models: Sequence[ModelSettings], check: Callable[[ModelSettings], T]) -> list[T]:
    """What `check` returns for each of a service's models. Its refusals begin with the model's name if there are
    several."""
    found = []
    for model in models:
        try:
            found.append(check(model))
        except QwenDistError as error:
            if len(models) > 1:
                error.args = (f"{model.name}: {error}",)
            raise
    return found


def check_model(model: ModelSettings) -> None:
    """Raises CheckpointError, ConfigError or ParallelLayoutError if the model is missing, or if context, layout or
    adapters do not fit it or its files cannot be read."""
    engine = model.replica.engine
    _check_files(model, resolve_config(engine.model, engine.revision))


def check_model_at_hand(model: ModelSettings) -> bool:
    """Checks a model as `check_model` does, without asking the hub. Returns whether its config.json was at hand."""
    engine = model.replica.engine
    path = config_at_hand(engine.model, engine.revision)
    if path is not None:
        _check_files(model, path)
    return path is not None


def _check_files(model: ModelSettings, path: Path) -> None:
    engine = model.replica.engine
    model_config = ModelConfig.from_directory(path)
    engine.layout.validate(model_config)
    check_context(engine, model_config)
    read_generation_defaults(path)
    read_eos_token_ids(path)
    open_adapters(engine.lora, model_config)
