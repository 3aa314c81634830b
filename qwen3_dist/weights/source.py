"""Finds a checkpoint: the bundled one, a directory, or a hub id (downloaded or taken from the cache)."""

from __future__ import annotations

import re
from pathlib import Path

from qwen3_dist.errors import CheckpointError
from qwen3_dist.weights.files import shard_files

_COMMIT = re.compile("[0-9a-f]{40}")
_CONFIGS = ["config.json", "generation_config.json"]
_FILES = ["*.json", "*.safetensors", "*.jinja"]


def bundled_path() -> Path:
    """The directory of the small checkpoint that ships with the package."""
    return Path(__file__).parent.parent / "bundled"


def local_path(model: str) -> Path:
    """The path that `model` would be, ~ being the user's home. Raises CheckpointError for a user without one."""
    try:
        return Path(model).expanduser()
    except RuntimeError:
        raise CheckpointError(
            f"{model} cannot be found: this user has no home; give the whole path"
        ) from None


def resolve_model(model: str, revision: str | None = None) -> Path:
    """The directory of `model`: "" is the bundled one, then a directory, then a hub id at `revision`.

    A commit that the local hub cache holds whole is taken from there, without asking the hub.
    Raises CheckpointError, in one sentence, if there is none.
    """
    return _resolve(model, revision, _FILES)


def resolve_config(model: str, revision: str | None = None) -> Path:
    """The directory of `model` as `resolve_model` finds it, of a hub id with its configs alone.

    Raises CheckpointError, in one sentence, if there is none.
    """
    return _resolve(model, revision, _CONFIGS)


def _resolve(model: str, revision: str | None, files: list[str]) -> Path:
    if not model:
        return bundled_path()
    path = local_path(model)
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise CheckpointError(
            f"{model} is neither a checkpoint directory nor a hub id such as Qwen/Qwen3-0.6B"
        )
    return snapshot_of(model, revision) or _from_hub(model, revision, files)


def commit_of(model: str, path: Path) -> str | None:
    """The commit of the hub id `model` that was found at `path`; None for a model that is no hub id.

    With it as revision, `resolve_model` finds the same files on every host.
    """
    if not model or local_path(model).is_dir():
        return None
    return path.name if path.parent.name == "snapshots" and _COMMIT.fullmatch(path.name) else None


def snapshot_of(model: str, revision: str | None) -> Path | None:
    """A commit's directory in the local hub cache; None if some of its files are not there, or for a branch, which the
    hub may have moved on."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if revision is None or not _COMMIT.fullmatch(revision):
        return None
    try:
        path = Path(snapshot_download(model, revision=revision, local_files_only=True))
        shard_files(path)
    except (LocalEntryNotFoundError, CheckpointError):
        return None
    return path if (path / "config.json").exists() else None


def _from_hub(model: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=files))
    except RepositoryNotFoundError:
        raise CheckpointError(f"the hub has no model {model!r}, or it needs a login; check the id") from None
    except RevisionNotFoundError:
        raise CheckpointError(f"model {model!r} has no revision {revision!r}; check --revision") from None
    except (LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{model!r} is no directory here, not in the local hub cache, and the hub cannot be reached "
            f"({type(error).__name__}); download it first or give a directory"
        ) from None
