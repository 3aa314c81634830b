"""A stage of the GPU check whose checks pass, fail, raise, are skipped, and hang with a child of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

from benchmarks.gpu_check.check import CheckFailed, CheckSkipped, Figures, PlannedCheck, Setting


def checks(setting: Setting) -> Iterator[PlannedCheck]:
    child = subprocess.Popen(["sleep", "600"])
    yield PlannedCheck("passes", lambda: {"child": child.pid}, 0)
    yield PlannedCheck("fails", _fails, 0)
    yield PlannedCheck("raises", lambda: {"share": 1 / 0}, 0)
    yield PlannedCheck("is skipped", _is_skipped, 0)
    yield PlannedCheck("has no time", dict, 3600)
    yield PlannedCheck("no end", _hangs, 0)
    yield PlannedCheck("a fault", lambda: os.kill(os.getpid(), signal.SIGSEGV) or {}, 0)
    yield PlannedCheck("an early end", lambda: sys.exit(0), 0)
    child.kill()


def _fails() -> Figures:
    raise CheckFailed("2 tokens of 5 differ", tokens=5)


def _is_skipped() -> Figures:
    raise CheckSkipped("there is one card")


def _hangs() -> Figures:
    while True:
        time.sleep(1)
