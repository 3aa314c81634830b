"""Runs a stage in its own process group and kills it at its deadline, even if it hangs in a driver call."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.report import FAILED, Check, StageReport

_STACKS_BEFORE_S = 1.0  # a stage dumps the stacks of its threads this long before its deadline
_ENDS_WITHIN_S = 10.0
_MAX_STDERR = 8000  # characters kept


@dataclass(frozen=True)
class Stage:
    """A stage: a module whose `checks(setting)` yields checks, its time limits, and advice for failures."""

    name: str
    module: str
    cuda_s: float
    cpu_s: float
    advice: str

    def limit_s(self, device: str) -> float:
        return self.cuda_s if device == "cuda" else self.cpu_s


@dataclass(frozen=True)
class Task:
    """The argument of a stage's process, as JSON. `only`: runs the checks whose name contains this text."""

    module: str
    device: str
    folder: str  # checkpoints, shared by all stages
    events: str  # file that gets a line when a check begins or ends
    limit_s: float
    dump_at_s: float  # when the stacks of all threads are written to stderr, by time.monotonic()
    layers: int
    only: str = ""


def run_stage(
    stage: Stage, device: str, folder: Path, layers: int = 24, only: str = "", time_factor: float = 1.0
) -> StageReport:
    """Runs `stage` until it ends or reaches its deadline, then kills its process group."""
    limit_s = stage.limit_s(device) * time_factor
    events, stderr = folder / f"{stage.name}.events", folder / f"{stage.name}.stderr"
    events.write_text("")
    started = time.monotonic()
    dump_at_s = started + max(limit_s / 2, limit_s - _STACKS_BEFORE_S)
    task = Task(stage.module, device, str(folder), str(events), limit_s, dump_at_s, layers, only)
    command = [sys.executable, "-m", "benchmarks.gpu_check.stage", json.dumps(asdict(task))]
    one_thread = (
        {} if device == "cuda" else {"OMP_NUM_THREADS": "1"}
    )  # more threads would slow each other down
    with stderr.open("w") as file:  # to a file, since planted faults print many tracebacks
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stderr=file,
            start_new_session=True,
            env={**os.environ, **one_thread},
        )
    try:
        code: int | None = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        _wait_for_group(process.pid)
    checks, running, finished = _read(events)
    ended = "" if finished else _ending(code, limit_s, running)
    if ended and code is not None and (last := _end_of(stderr).strip().rpartition("\n")[2]):
        ended += f": {last}"
    if running:
        checks.append(Check(running, FAILED, 0.0, "it did not end"))
    seconds = round(time.monotonic() - started, 1)
    report = StageReport(stage.name, stage.advice, seconds, limit_s, tuple(checks), ended)
    return replace(report, stderr=_end_of(stderr)) if report.status == FAILED else report


def _wait_for_group(group: int) -> None:
    """Waits up to some seconds until all processes of the group are gone, since they hold GPU memory until then."""
    deadline = time.monotonic() + _ENDS_WITHIN_S
    while _is_left(group) and time.monotonic() < deadline:
        time.sleep(0.02)


def _is_left(group: int) -> bool:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it has just ended
        if int(of_group) == group and state not in "ZX":
            return True
    return False


def _end_of(file: Path) -> str:
    return file.read_text(errors="replace")[-_MAX_STDERR:]


def _ending(code: int | None, limit_s: float, running: str) -> str:
    where = f" in {running!r}" if running else " between checks"
    if code is None:
        return f"killed at its time limit of {limit_s:g} s{where}"
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
    return f"its process ended {how}{where}"


def _read(events: Path) -> tuple[list[Check], str, bool]:
    """Finished checks, the name of the running check ("" if none), and whether the stage finished."""
    checks: list[Check] = []
    running = ""
    for line in events.read_text().splitlines():
        event: dict[str, Any] = json.loads(line)
        if "finished" in event:
            return checks, "", True
        running = event.get("begun", "")
        if not running:
            checks.append(Check(**event))
    return checks, running, False
