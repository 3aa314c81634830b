"""Finds a checkpoint: the bundled one, a directory, or a hub id, which is downloaded or found in the cache."""

from __future__ import annotations

import re
from pathlib import Path

from qwen3_dist.errors import CheckpointError
from qwen3_dist.quantization_files import QUANTIZATION_FILES
from qwen3_dist.weights import hub

_HUB_ID = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")
_OFFICIAL_NAME = re.compile(r"qwen3-[\w.-]+", re.IGNORECASE)
_CONFIGS = ["config.json", "generation_config.json", *QUANTIZATION_FILES]
_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]


def bundled_path() -> Path:
    """The directory of the small checkpoint that ships with the package."""
    return Path(__file__).parent.parent / "bundled"


def local_path(model: str) -> Path:
    """`model` as a path, with ~ expanded. Raises CheckpointError for ~ if the user has no home."""
    try:
        return Path(model).expanduser()
    except RuntimeError:
        raise CheckpointError(
            f"{model} cannot be found: this user has no home; give the whole path"
        ) from None


def canonical_name(model: str) -> str:
    """`model` as a directory or a hub id; "" is the bundled model.

    "bundled" becomes "", DIR/config.json becomes DIR, and an official name such as Qwen3-8B becomes Qwen/Qwen3-8B
    unless there is a directory of that name. Other names are not changed. Raises CheckpointError for ~ if the user has
    no home.
    """
    if model in ("", "bundled"):
        return ""
    path = local_path(model)
    if path.name == "config.json" and path.is_file():
        return str(path.parent)
    if _OFFICIAL_NAME.fullmatch(model) and not path.exists():
        return f"Qwen/{model}"
    return model


def may_be_model(text: str) -> bool:
    """Whether `text` has the form of a model's name: a path, `bundled`, an official name or a hub id."""
    if not text or any(char.isspace() for char in text):
        return False
    looks_local = text.startswith(("/", "./", "../", "~")) or Path(text).exists()
    names = _OFFICIAL_NAME.fullmatch(text) or _HUB_ID.fullmatch(text)
    return text == "bundled" or looks_local or names is not None


def resolve_model(
    model: str, revision: str | None = None, progress: hub.Downloading = lambda done, total: None
) -> Path:
    """Returns the directory of `model` (see `canonical_name`), for a hub id at `revision`, which is downloaded.

    A commit that is complete in the local hub cache is used without contacting the hub. `progress` is called while
    files are downloaded. Raises CheckpointError if there is no such model.
    """
    return _resolve(model, revision, _FILES, progress)


def resolve_config(model: str, revision: str | None = None) -> Path:
    """Like `resolve_model`, but downloads only the config files of a hub id."""
    return _resolve(model, revision, _CONFIGS)


def config_at_hand(model: str, revision: str | None = None) -> Path | None:
    """Like `resolve_config`, but asks no hub: None for a hub id whose config.json is not in the local hub cache."""
    name = canonical_name(model)
    if not name or not _HUB_ID.fullmatch(name) or local_path(name).exists():
        return _resolve(model, revision, _CONFIGS)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _resolve(
    model: str,
    revision: str | None,
    files: list[str],
    progress: hub.Downloading = lambda done, total: None,
) -> Path:
    given, model = model, canonical_name(model)
    if not model:
        return bundled_path()
    path = local_path(model)
    if path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(
            f"{given} is a file; give the directory that holds config.json and weights in safetensors format"
        )
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"{given} is neither a directory that exists nor bundled, an official name such as Qwen3-0.6B or a hub id "
            "such as Qwen/Qwen3-0.6B"
        )
    hub.require_cache(model)
    return hub.snapshot_of(model, revision, files) or hub.download(model, revision, files, progress)


def commit_of(model: str, path: Path) -> str | None:
    """The commit of hub id `model` at `path`; None if the model is not a hub id.

    With the commit as revision, `resolve_model` finds the same files on every host.
    """
    name = canonical_name(model)
    if not name or local_path(name).is_dir():
        return None
    return path.name if path.parent.name == "snapshots" and hub.is_commit(path.name) else None
