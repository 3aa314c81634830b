"""The processes that a benchmark has started: their titles, private memory and open files."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_PROC = Path("/proc")


def started(root: int | None = None) -> dict[int, str]:
    """The title of each process that `root`, this process by default, has started, and that those have started."""
    found: dict[int, str] = {}
    left = [root or os.getpid()]
    while left:
        for file in (_PROC / str(left.pop()) / "task").glob("*/children"):
            for child in map(int, _read(file).split()):
                left.append(child)
                if title := _read(_PROC / str(child) / "cmdline").replace("\0", " ").strip():
                    found[child] = title
    return found


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped, as by SIGSTOP."""
    return "State:\tT" in _read(_PROC / str(pid) / "status")


def private_bytes(pid: int) -> int:
    """The memory of a process that it does not share; 0 once it is gone."""
    for line in _read(_PROC / str(pid) / "status").splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    return 0


def open_sockets(pid: int) -> int:
    """The sockets that a process has open."""
    count = 0
    with contextlib.suppress(OSError):
        for file in (_PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):
                count += str(file.readlink()).startswith("socket:")
    return count


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
