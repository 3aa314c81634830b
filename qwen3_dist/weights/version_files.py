"""Finds and checks the files of weights that take the place of a model's own. Imports no torch, since engines check
them before ranks load them."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from qwen3_dist.config import ModelConfig
from qwen3_dist.errors import CheckpointError, ConfigError
from qwen3_dist.hf_overrides import HfOverrides
from qwen3_dist.weights.files import CheckpointFiles
from qwen3_dist.weights.fingerprint import digest_of_weights
from qwen3_dist.weights.source import local_path
from qwen3_dist.weights_version import WeightsVersion

_MAY_DIFFER = "dtype"  # weights are converted to the model's as they are read


def with_digest(weights: WeightsVersion, config: ModelConfig, overrides: HfOverrides) -> WeightsVersion:
    """`weights` with a digest of their files. Raises CheckpointError if the headers of the files cannot be read, or if
    their config.json, with `overrides`, is not that of a model of `config`."""
    if not weights.path:
        return weights
    path = directory_of(weights)
    try:
        found = ModelConfig.from_directory(path, overrides)
    except ConfigError as error:
        raise CheckpointError(f"{path / 'config.json'} cannot be used: {error}") from None
    for field in fields(config):
        there, here = getattr(found, field.name), getattr(config, field.name)
        if field.name != _MAY_DIFFER and there != here:
            raise CheckpointError(
                f"{path / 'config.json'} has {field.name} {_shown(there)} where the model has {_shown(here)}; weights "
                "must be of the same architecture and format"
            )
    try:
        CheckpointFiles(path)
        return replace(weights, digest=digest_of_weights(path))
    except OSError as error:
        raise CheckpointError(f"the weights in {path} cannot be read: {error}") from None


def directory_of(weights: WeightsVersion, own: Path | None = None) -> Path:
    """The directory of the weights; the model's `own` if they have none. Raises CheckpointError if it is not here."""
    if not weights.path:
        assert own is not None
        return own
    path = local_path(weights.path)
    if not path.is_dir():
        raise CheckpointError(f"there is no directory {weights.path}, from which weights were to be loaded")
    return path


def require_unchanged(weights: WeightsVersion) -> None:
    """Raises CheckpointError if the files are not those of the digest any more."""
    if weights.digest and digest_of_weights(directory_of(weights)) != weights.digest:
        raise CheckpointError(
            f"the files in {weights.path} are not those of version {weights.version} any more; load them as a new "
            "version"
        )


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) < 80 else "another value"
