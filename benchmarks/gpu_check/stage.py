"""Main function of a stage's process: runs its checks one after the other and prints a line for each.

python -m benchmarks.gpu_check.stage TASK        (see `supervisor.run_stage`)
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.check import CheckFailed, CheckSkipped, PlannedCheck, Setting
from benchmarks.gpu_check.report import FAILED, LEFT_OUT, PASSED, SKIPPED, Check
from benchmarks.gpu_check.supervisor import Task

_MAX_MESSAGE_LENGTH = 500  # characters


def run_checks(task: Task) -> Iterator[Check]:
    """Runs the checks of a stage's module. Yields the result of each as it ends."""
    deadline = time.monotonic() + task.limit_s
    setting = Setting(task.device, Path(task.folder), task.layers)
    planned: Iterator[PlannedCheck] = importlib.import_module(task.module).checks(setting)
    try:
        for check in planned:
            if task.only not in check.name:
                continue
            if time.monotonic() + check.needs_s > deadline:
                yield Check(check.name, LEFT_OUT, why="no time was left")
            else:
                yield _run(check, task)
    except CheckSkipped as reason:
        yield Check("all", SKIPPED, why=str(reason))


def _run(check: PlannedCheck, task: Task) -> Check:
    _write(task, {"begun": check.name})
    started = time.monotonic()
    try:
        done = Check(check.name, PASSED, figures=check.run())
    except CheckSkipped as reason:
        done = Check(check.name, SKIPPED, why=str(reason))
    except CheckFailed as failure:
        done = Check(check.name, FAILED, why=str(failure), figures=failure.figures)
    except Exception as error:  # go on with the other checks
        why = f"{type(error).__name__}: {error}"[:_MAX_MESSAGE_LENGTH]
        done = Check(check.name, FAILED, why=why, figures={"traceback": traceback.format_exc()})
    return replace(done, seconds=round(time.monotonic() - started, 1))


def _write(task: Task, event: dict[str, Any]) -> None:
    with open(task.events, "a") as file:
        file.write(json.dumps(event) + "\n")


def main() -> None:
    task = Task(**json.loads(sys.argv[1]))
    left_s = task.dump_at_s - time.monotonic()  # the start may have taken long
    faulthandler.dump_traceback_later(max(0.1, left_s))
    for check in run_checks(task):
        _write(task, asdict(check))
        print(check.line, flush=True)
    _write(task, {"finished": True})
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
