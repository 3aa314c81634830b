"""Ends every process of a local Ray when the process that started it ends, in whatever way.

Ray's raylet dies with the process that started it, but its agents then wait up to a minute for the cluster that is
gone. The guard is a process of its own that imports nothing but the standard library. It waits for the end of a pipe
that its owner holds, which comes also by SIGKILL, and then kills all processes that carry a mark in their environment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

_MARK = "QWEN3_DIST_RAY"
_WITHIN_S = 10.0
_POLL_S = 0.05


class RayGuard:
    """Kills what was started within `marking` once this process ends, or by `end_all`."""

    def __init__(self) -> None:
        self._mark = uuid.uuid4().hex
        self._process = subprocess.Popen(
            [sys.executable, "-I", __file__, f"{_MARK}={self._mark}"],
            stdin=subprocess.PIPE,
            start_new_session=True,  # what ends its owner's process group must not end it first
        )

    @contextlib.contextmanager
    def marking(self) -> Iterator[None]:
        """A context whose child processes, and all that those start, are the guard's."""
        os.environ[_MARK] = self._mark
        try:
            yield
        finally:
            del os.environ[_MARK]

    def end_all(self) -> None:
        """Kills what still runs and waits for its end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_WITHIN_S + 1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def kill_marked(entry: str) -> None:
    """Kills processes whose environment holds `entry`, NAME=value, until there are none; gives up after 10 s."""
    deadline = time.monotonic() + _WITHIN_S
    while (pids := _marked(entry)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)


def _marked(entry: str) -> list[int]:
    wanted, found = entry.encode(), []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            if wanted in file.read_bytes().split(b"\0"):
                found.append(int(file.parent.name))
    return found


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.stdin.buffer.read()
    kill_marked(sys.argv[1])
