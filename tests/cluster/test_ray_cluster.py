"""Starting, joining and leaving Ray, each in a process of its own as the command line does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import ray

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
try:
    ray.put(1)  # as threads of Serve's handles do, which end with the process
    raise SystemExit("a call has started a Ray")
except ray.exceptions.RaySystemError:
    assert not ray.is_initialized()
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
    """Also where `ray start` has left a note of another cluster, which Ray joins unless it is told not to."""
    command = [sys.executable, "-c", BOTH]
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # short, since Ray's sockets are in it
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
        environment = {**os.environ, "RAY_TMPDIR": folder}
        ended = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
        )
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
    assert "ResourceError: no Ray runs on this machine" in ended.stderr


class FakeRay:
    """Stands in for `ray` in `ray_cluster`: its starts fail as many times as it is told."""

    exceptions = ray.exceptions

    def __init__(self, failures: list[Exception]) -> None:
        self.failures = failures
        self.starts = self.shutdowns = 0

    def is_initialized(self) -> bool:
        return False

    def init(self, **_: object) -> None:
        self.starts += 1
        if self.failures:
            raise self.failures.pop(0)

    def shutdown(self) -> None:
        self.shutdowns += 1


TIMED_OUT = "The current node timed out during startup. This could happen because some of the raylet failed"


def test_a_user_without_a_home_is_told_what_ray_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(ray, "init", None)
    with pytest.raises(ResourceError, match="no home directory and Ray needs one; set HOME to a directory"):
        ray_cluster.connect(None)


def test_a_ray_that_does_not_come_up_in_time_is_started_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay([Exception(TIMED_OUT)])
    monkeypatch.setattr(ray_cluster, "ray", fake)
    assert ray_cluster.connect(None)
    assert (fake.starts, fake.shutdowns) == (2, 1)
    ray_cluster.shutdown()


def test_a_ray_that_never_comes_up_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay([Exception(f"{TIMED_OUT}\nmore lines")] * 2)
    monkeypatch.setattr(ray_cluster, "ray", fake)
    with pytest.raises(ResourceError, match="timed out during startup.*ray start --head") as told:
        ray_cluster.connect(None)
    assert "\n" not in str(told.value)
    assert (fake.starts, fake.shutdowns) == (2, 2)


def refused_for_its_token() -> ConnectionError:
    """What `ray.init` raises when the cluster was started on a host where a token lies."""
    error = ConnectionError("Failed to connect to Ray cluster at 127.0.0.1:6399")
    error.__cause__ = RuntimeError(
        "Failed to connect to GCS. Last connection error: RPC error: InvalidAuthToken: ..."
    )
    return error


@pytest.mark.parametrize(
    "error", [refused_for_its_token(), ray.exceptions.AuthenticationError("no token was found")]
)
def test_a_cluster_with_another_token_is_refused_with_the_variable_that_mends_it(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(ray_cluster, "ray", FakeRay([error]))
    monkeypatch.setattr(ray_cluster, "_require_answer", lambda _: None)
    with pytest.raises(ResourceError, match="RAY_AUTH_MODE=token") as told:
        ray_cluster.connect("127.0.0.1:6399")
    assert "\n" not in str(told.value)
