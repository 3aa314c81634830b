"""Ends every process of a local Ray when the process that started it ends, even by SIGKILL.

Ray's raylet dies with the process that started it, but its agents linger for up to a minute. The guard is a process
that imports only the standard library. It waits for end of file on a pipe that its owner holds. Then it kills all
processes with a marker variable in their environment, and all descendants that it recorded earlier: processes that set
their title, as Ray's agents do, overwrite their environment.
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
_TIMEOUT_S = 10.0
_POLL_S = 0.05
_Process = tuple[int, str]  # id and start time


class RayGuard:
    """Kills the processes that were started within `watching_children`, when this process ends or calls `end_all`."""

    def __init__(self) -> None:
        self._mark = uuid.uuid4().hex
        self._process = subprocess.Popen(
            [sys.executable, "-I", __file__, f"{_MARK}={self._mark}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a signal to its owner's process group must not kill it
        )

    @contextlib.contextmanager
    def watching_children(self) -> Iterator[None]:
        """A context whose child processes, and all their descendants, will be killed."""
        os.environ[_MARK] = self._mark
        try:
            yield
        finally:
            del os.environ[_MARK]
            assert self._process.stdin is not None and self._process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(b"record\n")
                self._process.stdin.flush()
                self._process.stdout.readline()  # answered after recording; end of file if the guard was killed

    def end_all(self) -> None:
        """Kills the processes that still run, and waits until they are gone."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_TIMEOUT_S + 1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def guard(entry: str, commands: Iterable[bytes]) -> None:
    """Records, at each of `commands`, the processes whose environment holds `entry` and their descendants, and
    confirms on stdout. After the last command kills them all until none is left, for at most 10 s."""
    seen: set[_Process] = set()
    for _ in commands:
        seen = _find_marked(entry)
        print("recorded", flush=True)
    deadline = time.monotonic() + _TIMEOUT_S
    while (found := _find_marked(entry) | {each for each in seen if _started(each[0]) == each[1]}) and (
        time.monotonic() < deadline
    ):
        seen |= found
        for pid, _start in found:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)


def _find_marked(entry: str) -> set[_Process]:
    """Processes whose environment holds `entry`, and their descendants."""
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
    """Start time of a process, which tells it from a later process with the same id; "" if it has ended."""
    try:
        fields = _fields(pid)
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _fields(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the process name: state, parent and so on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    guard(sys.argv[1], sys.stdin.buffer)
