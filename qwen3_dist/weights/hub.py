"""Fetches models from the hub into the local hub cache, which the processes of a host share.

`huggingface_hub` locks each file of the cache, so one of several processes downloads it. It goes on with a part of a
file after a lost connection, but not after the end of its process, which whole files outlast.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from qwen3_dist.errors import CheckpointError
from qwen3_dist.weights.files import shard_files

# Called each second of a download with the bytes that are there and those of the whole, 0 if the hub does not tell.
Downloading = Callable[[int, int], None]

_COMMIT = re.compile("[0-9a-f]{40}")
_PERIOD_S = 1.0
_LOG_PERIOD_S = 10.0
_ASK_TIMEOUT_S = 10.0
_GB = 1e9
# What versions of huggingface_hub raise after a connection was lost again and again: errors of the library that they
# use for HTTP. Its own hf_xet raises RuntimeError.
_TRANSPORTS = ("httpx", "httpx2", "requests", "urllib3")

_log = logging.getLogger(__name__)


def is_commit(revision: str) -> bool:
    return _COMMIT.fullmatch(revision) is not None


def require_cache(model: str) -> None:
    """Raises CheckpointError if there is no directory to keep downloads of `model` in."""
    from huggingface_hub import constants

    try:
        Path(constants.HF_HUB_CACHE).expanduser()
    except RuntimeError:
        raise CheckpointError(
            f"{model!r} is a hub id and this user has no home to keep downloads in; set HF_HOME to a directory, or "
            "give the checkpoint's"
        ) from None


def snapshot_of(model: str, revision: str | None, files: Sequence[str]) -> Path | None:
    """The directory of a commit in the local hub cache. None if `files` (patterns of names) are missing, or if
    `revision` is a branch, which may have changed on the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if revision is None or not is_commit(revision):
        return None
    try:
        path = Path(
            snapshot_download(model, revision=revision, allow_patterns=[*files], local_files_only=True)
        )
        shard_files(path)
    except (LocalEntryNotFoundError, CheckpointError):
        return None
    return path if (path / "config.json").exists() else None


def download(
    model: str, revision: str | None, files: Sequence[str], progress: Downloading = lambda done, total: None
) -> Path:
    """Downloads those of `files` (patterns of names) that the local hub cache lacks. Returns their directory.

    On a terminal huggingface_hub draws a bar, elsewhere a line is logged every ten seconds. If the hub cannot be
    reached and the cache has the revision, that is taken. Raises CheckpointError if it has not, if the hub does not
    give the model, and if the disk is full; whole files stay for the next try.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        with _watched(model, revision, files, progress):
            return Path(snapshot_download(model, revision=revision, allow_patterns=[*files]))
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"the hub has no model {model!r}, or it needs a login; check the id, or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"model {model!r} has no revision {revision!r}; check --revision") from None
    except LocalEntryNotFoundError as error:
        raise _unreachable(model, error.__cause__ or error) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(model) from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise CheckpointError(
                f"the hub cache cannot be written: {error}; set HF_HOME to a directory of this user"
            ) from None
        raise _unreachable(model, error) from None
    except Exception as error:
        if not (isinstance(error, RuntimeError) or type(error).__module__.partition(".")[0] in _TRANSPORTS):
            raise
        raise CheckpointError(
            f"the download of {model!r} was interrupted ({type(error).__name__}: {error}); start again: whole files "
            "are kept"
        ) from None


def _unreachable(model: str, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"{model!r} is no directory here, not in the local hub cache, and the hub cannot be reached "
        f"({type(error).__name__}); download it first or give a directory"
    )


def _no_room(model: str) -> CheckpointError:
    folder = next(path for path in _cache_of(model).parents if path.exists())
    free = shutil.disk_usage(folder).free / _GB
    return CheckpointError(
        f"the disk of the hub cache {folder} is full ({free:.1f} GB free), and {model!r} is not complete; make room "
        "or set HF_HOME to a larger disk; whole files are kept"
    )


@contextlib.contextmanager
def _watched(model: str, revision: str | None, files: Sequence[str], progress: Downloading) -> Iterator[None]:
    """A context in which a thread reports how far the download of `files` is, and logs it if stderr is no terminal."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    draws = sys.stderr is not None and sys.stderr.isatty()
    hidden = not draws and not are_progress_bars_disabled()
    ended, telling = threading.Event(), threading.Lock()

    def tell(done: int, total: int) -> None:
        with telling:  # nothing is told any more once the download has ended
            if not ended.is_set():
                progress(done, total)

    arguments = (model, revision, files, tell, ended, not draws)
    if hidden:
        disable_progress_bars()
    threading.Thread(target=_watch, args=arguments, name="hub-download", daemon=True).start()
    try:
        yield
    finally:
        with telling:
            ended.set()
        if hidden:
            enable_progress_bars()


def _watch(
    model: str,
    revision: str | None,
    files: Sequence[str],
    progress: Downloading,
    ended: threading.Event,
    logs: bool,
) -> None:
    if ended.wait(_PERIOD_S):
        return  # there was nothing to download
    blobs: dict[str, int] = {}
    first, began = 0, 0.0
    logged = time.monotonic() - _LOG_PERIOD_S
    while not ended.is_set():
        if not blobs:
            blobs = _sizes_of_blobs(model, revision, files)
            first, began = _bytes_there(model, blobs), time.monotonic()
        now, done, total = time.monotonic(), _bytes_there(model, blobs), sum(blobs.values())
        progress(done, total)
        if logs and now - logged >= _LOG_PERIOD_S:
            logged = now
            rate = (done - first) / max(now - began, _PERIOD_S)
            of = f"{done / _GB:.2f} of {total / _GB:.2f} GB" if total else f"{done / _GB:.2f} GB"
            _log.info("downloading %s: %s, %.2f GB/s", model, of, rate / _GB)
        ended.wait(_PERIOD_S)


def _sizes_of_blobs(model: str, revision: str | None, files: Sequence[str]) -> dict[str, int]:
    """The bytes of each file to download, by its name in the cache; empty if the hub does not tell."""
    from huggingface_hub import HfApi

    with contextlib.suppress(
        Exception
    ):  # each version has other ones; the download itself raises what is wrong
        info = HfApi().model_info(model, revision=revision, files_metadata=True, timeout=_ASK_TIMEOUT_S)
        found = info.siblings or []
        return {
            entry.lfs.sha256 if entry.lfs else entry.blob_id or "": entry.size or 0
            for entry in found
            if any(fnmatch(entry.rfilename, pattern) for pattern in files)
        }
    return {}


def _cache_of(model: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser() / f"models--{model.replace('/', '--')}"


def _bytes_there(model: str, blobs: Mapping[str, int]) -> int:
    """The bytes of `blobs` in the cache, of those that are not complete too; of all files if none is known."""
    there: Counter[str] = Counter()
    with contextlib.suppress(OSError):  # files get their last names meanwhile
        for entry in os.scandir(_cache_of(model) / "blobs"):
            name = entry.name.partition(".")[0]  # killed downloads leave other parts of it
            there[name] = max(there[name], entry.stat().st_size)
    return sum(min(size, blobs.get(name, 0)) if blobs else size for name, size in there.items())
