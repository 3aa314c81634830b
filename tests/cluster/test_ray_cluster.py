"""Starting, joining and leaving Ray, each in a process of its own as the command line does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import ray_cluster
from qwen3_dist.errors import ResourceError

ROOT = Path(__file__).parent.parent.parent

BOTH = """
import subprocess, sys, ray
from cluster import ray_cluster

assert ray_cluster.connect(None, num_cpus=1)
assert not ray_cluster.connect(None)  # already connected: nothing to end for the second caller
address = ray.get_runtime_context().gcs_address
joiner = f'''
import ray
from cluster import ray_cluster
assert not ray_cluster.connect("{address}")
assert ray.cluster_resources()["CPU"] == 1
ray_cluster.shutdown()
'''
subprocess.run([sys.executable, "-c", joiner], check=True, timeout=60)
assert ray.cluster_resources()["CPU"] == 1  # the joiner left, the cluster stays
ray_cluster.shutdown()
print(address)
"""


def raylets() -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes()
        except OSError:
            continue
        if b"raylet/raylet" in command or b"gcs_server" in command:
            found.append(command.replace(b"\0", b" ").decode())
    return found


def test_a_cluster_started_here_ends_here_and_a_joined_one_does_not() -> None:
    command = [sys.executable, "-c", BOTH]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    port = ended.stdout.strip().rpartition(":")[2]
    deadline = time.monotonic() + 20
    while any(port in command for command in raylets()):
        assert time.monotonic() < deadline, raylets()
        time.sleep(0.2)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no-such-host.invalid:6379"])
def test_an_address_where_nobody_answers_is_refused(address: str) -> None:
    with pytest.raises(ResourceError, match=f"no Ray cluster answers at {address}"):
        ray_cluster.connect(address)


def test_auto_without_a_running_cluster_is_refused(tmp_path: Path) -> None:
    code = "from cluster import ray_cluster; ray_cluster.connect('auto')"
    # Where processes may have a namespace of their own, a Ray of somebody else's is not seen from there.
    apart = ["unshare", "--pid", "--fork", "--mount-proc"]
    can = shutil.which("unshare") and subprocess.run([*apart, "true"], capture_output=True).returncode == 0
    ended = subprocess.run(
        [*(apart if can else ()), sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "RAY_TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "ResourceError: no Ray cluster can be joined at 'auto'" in ended.stderr
