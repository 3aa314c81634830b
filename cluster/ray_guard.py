"""Ends every process of a local Ray when the process that started it ends, in whatever way.

Ray's raylet dies with the process that started it, but its agents then wait up to a minute for the cluster that is
gone. The guard is a process of its own that imports nothing but the standard library. It waits for the end of a pipe
that its owner holds, which comes also by SIGKILL, and then kills all processes that carry a mark in their environment,
and all that it saw below those before: a process that gives itself a title, as Ray's agents do, loses its environment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

_MARK = "QWEN3_DIST_RAY"
_WITHIN_S = 10.0
_POLL_S = 0.05
_Process = tuple[int, str]  # id and start time


class RayGuard:
    """Kills what was started within `marking` once this process ends, or by `end_all`."""

    def __init__(self) -> None:
        self._mark = uuid.uuid4().hex
        self._process = subprocess.Popen(
            [sys.executable, "-I", __file__, f"{_MARK}={self._mark}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
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
            assert self._process.stdin is not None and self._process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(b"look\n")
                self._process.stdin.flush()
                self._process.stdout.readline()  # once it has looked; nothing, if it was killed

    def end_all(self) -> None:
        """Kills what still runs and waits for its end."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_WITHIN_S + 1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def guard(entry: str, looks: Iterable[bytes]) -> None:
    """Remembers, at each of `looks`, the processes whose environment holds `entry` and those below them, says so, and
    after the last one kills all of these until there are none; gives up after 10 s."""
    seen: set[_Process] = set()
    for _ in looks:
        seen = _marked(entry)
        print("looked", flush=True)
    deadline = time.monotonic() + _WITHIN_S
    while (found := _marked(entry) | {each for each in seen if _started(each[0]) == each[1]}) and (
        time.monotonic() < deadline
    ):
        seen |= found
        for pid, _start in found:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)


def _marked(entry: str) -> set[_Process]:
    """Processes whose environment holds `entry`, and those that they started."""
    wanted = entry.encode()
    pids, parents = set(), {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            parents[int(folder.name)] = int(_fields(int(folder.name))[1])
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                pids.add(int(folder.name))
    while below := {pid for pid, parent in parents.items() if parent in pids} - pids:
        pids |= below
    return {(pid, started) for pid in pids if (started := _started(pid))}


def _started(pid: int) -> str:
    """When a process started, which tells it from a later one of its id; "" once it has ended."""
    try:
        fields = _fields(pid)
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _fields(pid: int) -> list[str]:
    """What /proc says of a process after its name: state, parent, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    guard(sys.argv[1], sys.stdin.buffer)
