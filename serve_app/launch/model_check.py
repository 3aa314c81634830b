"""What is checked before anything starts: a model, by its config.json, and the keys file. Imports no Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from qwen3_dist.config import ModelConfig
from qwen3_dist.engine.request_checks import check_context
from qwen3_dist.errors import ConfigError, QwenDistError
from qwen3_dist.text.sidecars import read_eos_token_ids, read_generation_defaults
from qwen3_dist.weights.adapter_files import open_adapters
from qwen3_dist.weights.files import has_weights, shard_files
from qwen3_dist.weights.source import canonical_name, config_at_hand, local_path, resolve_config
from serve_app.settings import IngressSettings, ModelSettings
from serve_app.settings.keys import read_keys

T = TypeVar("T")


def check_each(models: Sequence[ModelSettings], check: Callable[[ModelSettings], T]) -> list[T]:
    """What `check` returns for each of a service's models. Its refusals begin with the model's name if there are
    several, and tell which setting of which model is to blame."""
    found = []
    for index, model in enumerate(models):
        try:
            found.append(check(model))
        except QwenDistError as error:
            if len(models) > 1:
                error.args = (f"{model.name}: {error}",)
            if error.setting:
                error.setting = ("models", str(index), *error.setting)
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
    model_config = ModelConfig.from_directory(path, engine.hf_overrides)
    with _error_path("layout"):
        engine.layout.validate(model_config)
    with _error_path("max_model_len"):
        check_context(engine, model_config)
    with _error_path("quantize"):
        model_config.rounded(engine.quantize)
    with _error_path("kv_cache_dtype"):
        engine.cache_dtype(model_config)
    is_hub_id = not local_path(canonical_name(engine.model)).is_dir()  # then weights may still be downloaded
    if engine.load_format != "random" and not is_hub_id and has_weights(path):
        shard_files(path)
    read_generation_defaults(path)
    read_eos_token_ids(path)
    with _error_path("lora"):
        open_adapters(engine.lora, model_config)


def check_keys_file(ingress: IngressSettings) -> None:
    """Raises ConfigError if there is a keys file and it cannot be used."""
    if not ingress.keys_file:
        return
    try:
        read_keys(ingress.keys_file)
    except ConfigError as error:
        raise ConfigError(f"the keys_file cannot be used: {error}", ("keys_file",)) from None


@contextmanager
def _error_path(setting: str) -> Iterator[None]:
    """A context whose refusals name `setting` as their path."""
    try:
        yield
    except QwenDistError as error:
        error.setting = (setting,)
        raise
