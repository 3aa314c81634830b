"""What an engine checks of a model's files before it starts ranks, which takes long."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from qwen3_dist.config import ModelConfig, fields_not_understood
from qwen3_dist.engine.request_checks import check_context
from qwen3_dist.settings import EngineConfig
from qwen3_dist.weights.adapter_files import open_adapters, with_digests
from qwen3_dist.weights.files import CheckpointFiles
from qwen3_dist.weights.source import commit_of
from qwen3_dist.weights.version_files import with_digest

_log = logging.getLogger(__name__)


def checked_model(config: EngineConfig, path: Path) -> ModelConfig:
    """The model's shape by the config.json in `path` and `config`. Logs a warning that names the fields of config.json
    that nothing here understands.

    Raises CheckpointError if a file of weights is missing, cut or of another format, and CheckpointError, ConfigError
    or ParallelLayoutError if model, layout, context, quantisation and adapters do not fit.
    """
    model_config = ModelConfig.from_directory(path, config.hf_overrides)
    if fields := fields_not_understood(path):
        names = ", ".join(fields)
        _log.warning(
            f"{path / 'config.json'} has {names}, which this service does not know; "
            "the model's output may differ from what that asks for"
        )
    if config.load_format != "random" and not config.weights.path:
        CheckpointFiles(path)  # reads every file's header, which ranks do again
    config.layout.validate(model_config)
    check_context(config, model_config)
    model_config.rounded(config.quantize)
    config.cache_dtype(model_config)
    open_adapters(config.lora, model_config)
    return model_config


def pinned(config: EngineConfig, path: Path, model_config: ModelConfig) -> EngineConfig:
    """The config with the exact commit at `path`, so that ranks on all hosts load the same files, and with digests of
    the adapters and of the weights that take the place of the model's. Raises CheckpointError if an adapter or weights
    cannot be used."""
    commit = commit_of(config.model, path)
    revision = config.revision if commit is None else commit
    weights = with_digest(config.weights, model_config, config.hf_overrides)
    return replace(config, revision=revision, lora=with_digests(config.lora, model_config), weights=weights)
