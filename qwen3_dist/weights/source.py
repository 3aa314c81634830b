"""Finds a checkpoint: the bundled one, a directory, or a hub id (downloaded or taken from the cache)."""

from __future__ import annotations

import re
from pathlib import Path

from qwen3_dist.errors import CheckpointError

_FILES = ["*.json", "*.safetensors", "*.jinja"]


def bundled_path() -> Path:
    """The directory of the small checkpoint that ships with the package."""
    return Path(__file__).parent.parent / "bundled"


def resolve_model(model: str, revision: str | None = None) -> Path:
    """The directory of `model`: "" is the bundled one, then a directory, then a hub id at `revision`.

    Raises CheckpointError, in one sentence, if there is none.
    """
    if not model:
        return bundled_path()
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise CheckpointError(
            f"{model} is neither a checkpoint directory nor a hub id such as Qwen/Qwen3-0.6B"
        )
    return _from_hub(model, revision)


def _from_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_FILES))
    except RepositoryNotFoundError:
        raise CheckpointError(f"the hub has no model {model!r}, or it needs a login; check the id") from None
    except RevisionNotFoundError:
        raise CheckpointError(f"model {model!r} has no revision {revision!r}; check --revision") from None
    except (LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{model!r} is no directory here, not in the local hub cache, and the hub cannot be reached "
            f"({type(error).__name__}); download it first or give a directory"
        ) from None
