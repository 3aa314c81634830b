"""The guard of a local Ray, on plain processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.ray_guard import RayGuard
from tests.ranks import ROOT
from tests.serve_app.support import wait_for

# Starts a process, which starts another and leaves it to itself, and says their ids.
PARENT = """
import os, subprocess, sys
bare = {name: value for name, value in os.environ.items() if "RAY" not in name}  # as a title takes it away
command = [sys.executable, "-c", "import time; time.sleep(600)"]
child = subprocess.Popen(command, start_new_session=True, env=bare)
print(child.pid, flush=True)
child.wait()
"""
OWNER = """
import subprocess, sys, time
from cluster.ray_guard import RayGuard
guard = RayGuard()
with guard.watching_children():
    parent = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
    child = parent.stdout.readline().strip()
unmarked = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(parent.pid, child, unmarked.pid, flush=True)
time.sleep(600)
"""


def runs(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_marked_processes_and_what_they_left_behind_end_with_their_owner(ending: signal.Signals) -> None:
    command = [sys.executable, "-c", OWNER, PARENT]
    owner = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert owner.stdout is not None
    parent, grandchild, unmarked = map(int, owner.stdout.readline().split())
    os.kill(parent, signal.SIGKILL)  # its child is nobody's now
    os.kill(owner.pid, ending)
    owner.wait()
    wait_for(lambda: not runs(parent) and not runs(grandchild))
    assert runs(unmarked)
    os.kill(unmarked, signal.SIGKILL)


def test_a_guard_that_is_told_to_end_all_waits_for_their_end() -> None:
    guard = RayGuard()
    with guard.watching_children():
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    guard.end_all()
    assert not runs(child.pid)
    assert child.wait() == -signal.SIGKILL
    assert not [name for name in os.environ if name.startswith("QWEN3_DIST_RAY")]
