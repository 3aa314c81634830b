"""Compiles the CPU kernels for this machine, once, into the user's cache directory or else a temporary one."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch

_log = logging.getLogger(__name__)
_SOURCES = Path(__file__).parent
_COMPILE = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC")
_FAST = ("-ffast-math", "-fno-finite-math-only")
# For deterministic mode: the compiler keeps the order of sums, so that it is the same in each copy of a loop it makes.
_FIXED = ("-DDETERMINISTIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
_TIMEOUT_S = 300.0


@functools.cache
def library(deterministic: bool = False) -> Path | None:
    """The compiled kernels, built now if they are not in the cache; None, with a warning, if that fails.
    `deterministic` builds those whose result for a row does not depend on the rows around it.

    Ranks that start together wait for the first of them to build.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        _log.warning("no C++ compiler was found, so CPU ranks use plain torch, which is slower; install g++")
        return None
    try:
        flags = (*_COMPILE, *(_FIXED if deterministic else _FAST))
        name = f"kernels-{_fingerprint(compiler, flags)}.so"
        cache = _user_cache()
        if cache is not None and (cache / name).exists():  # the directory may be read-only
            return cache / name
        folder = cache if cache is not None and _is_writable(cache) else _private_folder()
        built = folder / name
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not built.exists():
                _build(compiler, flags, built)
        return built
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        _log.warning("the CPU kernels could not be built, so CPU ranks use plain torch: %s", output[-2000:])
        return None


def _build(compiler: str, flags: tuple[str, ...], built: Path) -> None:
    with tempfile.TemporaryDirectory(dir=built.parent) as work:
        compiled, linked = Path(work) / "cpu.o", Path(work) / "cpu.so"
        _run(compiler, *flags, "-c", str(_SOURCES / "cpu.cpp"), "-o", str(compiled))
        # Linked without -ffast-math, which would change how the whole process rounds denormals, and with
        # torch's own OpenMP: two of them would keep two pools of spinning threads.
        _run(compiler, "-shared", str(compiled), "-o", str(linked), *_openmp(), "-lm")
        linked.rename(built)


def _openmp() -> list[str]:
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return [str(bundled[0])] if bundled else ["-fopenmp"]


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)


def _user_cache() -> Path | None:
    """This project's directory in the user's cache; None if the user has no home, as in some containers."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen3_dist"
    except RuntimeError:
        return None


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _private_folder() -> Path:
    """A temporary directory that all processes of this user share and no other user can write to."""
    folder = Path(tempfile.gettempdir()) / f"qwen3_dist-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
        return folder
    return Path(tempfile.mkdtemp(prefix="qwen3_dist-"))


def _fingerprint(compiler: str, flags: tuple[str, ...]) -> str:
    """A hash of all that the library depends on: sources, flags, compiler, torch and the CPU's instruction sets."""
    digest = hashlib.sha256(" ".join((*flags, torch.__version__)).encode())
    for source in sorted((*_SOURCES.glob("*.cpp"), *_SOURCES.glob("*.h"))):  # beside them lie Python's files
        digest.update(source.read_bytes())
    digest.update(subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    digest.update(next((line for line in lines if line.startswith(("flags", "Features"))), "").encode())
    return digest.hexdigest()[:16]
