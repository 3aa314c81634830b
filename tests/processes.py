"""Finding processes that tests have started, beside those of other test runs on the machine."""

from __future__ import annotations

import os
import time
from pathlib import Path

RUN = "QWEN3_DIST_TEST_RUN"  # set by `conftest.py`; whatever a test starts inherits it


def processes_running(words: str) -> list[int]:
    """Ids of this test run's processes whose command line holds `words`.

    A process that gives itself a title, as Ray's do, loses its environment to it; it is known by its parents.
    """
    ours = {*with_environment(f"{RUN}={os.environ[RUN]}"), *descendants(os.getpid())} - {os.getpid()}
    return sorted(pid for pid in ours if words in command(pid))


def wait_until_gone(words: str) -> None:
    deadline = time.monotonic() + 60
    while processes_running(words):
        assert time.monotonic() < deadline, f"{words} still runs"
        time.sleep(0.1)


def wait_until_none_has(entry: str, timeout_s: float = 60.0) -> None:
    """Waits until no process has the environment entry `NAME=value`. Fails with the commands of those that stay."""
    deadline = time.monotonic() + timeout_s
    while left := with_environment(entry):
        assert time.monotonic() < deadline, [f"{pid} {command(pid)}" for pid in left]
        time.sleep(0.1)


def descendants(pid: int) -> list[int]:
    """Processes that `pid` started, and those that they started."""
    children = [
        int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in _read(file).split()
    ]
    return children + [grandchild for child in children for grandchild in descendants(child)]


def command(pid: int) -> str:
    """The process's title, "" once it is gone."""
    return _read(Path(f"/proc/{pid}/cmdline")).replace("\0", " ")


def with_environment(entry: str) -> list[int]:
    """Processes that inherited the environment entry `NAME=value`."""
    return [
        int(file.parent.name)
        for file in Path("/proc").glob("[0-9]*/environ")
        if entry in _read(file).split("\0")
    ]


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
