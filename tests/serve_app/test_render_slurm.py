"""The script for Slurm, run by a stub that starts each step on this machine: two Ray nodes and a service."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.processes import processes_running, wait_until_gone
from tests.serve_app.command_line import printed
from tests.serve_app.support import free_port, wait_for

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
[ "$*" = "show hostnames two-nodes" ] && printf '127.0.0.1\\n127.0.0.1\\n'
"""
START_S = 240


@pytest.fixture
def work() -> Iterator[Path]:
    """A folder with a short name, since Ray's sockets lie in it, and the commands of Slurm."""
    with tempfile.TemporaryDirectory(prefix="qd") as folder:
        bin = Path(folder) / "bin"
        bin.mkdir()
        for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
            (bin / name).write_text(script)
            (bin / name).chmod(0o755)
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_job_serves_from_two_nodes_and_leaves_nothing(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    script = work / "job.sbatch"
    script.write_text(
        printed(
            capsys,
            *("render", "slurm", "--layout", "dp=2,ep=2", "--device", "cpu", "--port", str(port)),
            # A node with one CPU has no room for both ranks.
            *("--nodes", "2", "--cpus-per-node", "1", "--ray-port", str(free_port())),
            *("--num-blocks", "128", "--host", "127.0.0.2", "--graceful-shutdown-timeout-s", "20"),
        )
    )
    assert "#SBATCH --nodes=2" in script.read_text() and "gpus-per-node" not in script.read_text()
    scratch = work / "tmp"
    scratch.mkdir()
    environment = {
        **os.environ,
        "PATH": f"{work / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "two-nodes",
        "TMPDIR": str(scratch),
        "RAY_TMPDIR": str(work),
    }
    with (work / "out").open("w") as out:
        job = subprocess.Popen(["bash", str(script)], env=environment, stdout=out, stderr=out)
    url = f"http://127.0.0.2:{port}"

    def is_ready() -> bool:
        assert job.poll() is None, (work / "out").read_text()
        try:
            return httpx.get(f"{url}/ready", timeout=10).is_success
        except httpx.TransportError:
            return False

    try:
        wait_for(is_ready, START_S)
        assert len(processes_running("raylet/raylet")) == 2
        [replica] = httpx.get(f"{url}/v1/cluster/ranks", timeout=60).json()["data"]
        assert len(replica["ranks"]) == 2
        body = {"prompt": "hi", "max_tokens": 4, "ignore_eos": True}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
        assert answer.is_success and answer.json()["usage"]["completion_tokens"] == 4
        job.send_signal(signal.SIGTERM)
        assert job.wait(120) == 0, (work / "out").read_text()
    finally:
        job.kill()
    wait_until_gone("raylet/raylet")
    wait_until_gone("gcs_server")
    assert not list(scratch.glob("tmp.*")), "the job's own folder stays"
