"""Two Ray nodes that share nothing but a network: own addresses, own /dev/shm, checkpoints in other places.

Network and mount namespaces make two hosts of one machine. They need root; where that is missing,
`test_executors` still runs two raylets.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen3_dist.model.reference import load_reference
from tests.checkpoints import write_checkpoint
from tests.ranks import ROOT

REPO_ID, REVISION = "someone/tiny", "0" * 40
NODE = """
mount -t tmpfs none /dev/shm && mount -t tmpfs none "$1/scratch" || exit 1
export HF_HOME="$1/hub" HF_HUB_OFFLINE=1 RAY_TMPDIR="$1/scratch" RAY_AUTH_MODE=disabled
shift
exec "$@"
"""
DRIVER = """
import subprocess, sys, time, ray
from qwen3_dist import LLM, SamplingParams

ray_command, *layouts = sys.argv[1:]
head = [ray_command, "start", "--head", "--port=6399", "--include-dashboard=false", "--num-cpus=1"]
subprocess.run([*head, "--node-ip-address=10.213.7.1"], check=True, stdout=subprocess.DEVNULL)
ray.init(address="10.213.7.1:6399", log_to_driver=False)
while len({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}) < 2:
    time.sleep(0.2)
params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
for layout in layouts:
    with LLM("someone/tiny", layout=layout, executor="ray", cpus_per_rank=1.0, use_tqdm=False) as llm:
        group = next(g for g in ray.util.placement_group_table().values() if g["state"] == "CREATED")
        assert len(set(group["bundles_to_node_id"].values())) == 2, group
        print(llm.generate([[5, 6, 7]], params, use_tqdm=False)[0].token_ids, flush=True)
"""


def can_make_namespaces() -> bool:
    if not shutil.which("ip") or not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "-n", "-m", "true"], capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not can_make_namespaces(), reason="network namespaces need root and iproute2")


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two network namespaces, 10.213.7.1 and 10.213.7.2, joined by a cable."""
    names = [f"qd{os.getpid()}a", f"qd{os.getpid()}b"]
    try:
        for name in names:
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        run("ip", "-n", names[0], "link", "add", "cable", "type", "veth", "peer", "cable", "netns", names[1])
        for number, name in enumerate(names, start=1):
            run("ip", "-n", name, "addr", "add", f"10.213.7.{number}/24", "dev", "cable")
            run("ip", "-n", name, "link", "set", "cable", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.fixture
def folders(hosts: list[str]) -> Iterator[list[Path]]:
    """A folder for each host, with a short name: sockets lie in it."""
    made = [Path(tempfile.mkdtemp(prefix="qd")) for _ in hosts]
    yield made
    for folder in made:
        shutil.rmtree(folder)


def start(host: str, folder: Path, *command: str) -> subprocess.Popen[str]:
    """`command` on a host of its own, whose processes all end with it."""
    (folder / "scratch").mkdir()
    alone = [
        "unshare",
        "-m",
        "-p",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "sh",
        "-c",
        NODE,
        "sh",
        str(folder),
    ]
    return subprocess.Popen(
        ["ip", "netns", "exec", host, *alone, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def put_in_cache(checkpoint: Path, folder: Path) -> None:
    """Where huggingface_hub finds a snapshot that it downloaded."""
    repository = folder / "hub" / "hub" / f"models--{REPO_ID.replace('/', '--')}"
    shutil.copytree(checkpoint, repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)


def test_hosts_that_share_only_a_network_give_what_one_gives(
    hosts: list[str], folders: list[Path], tmp_path: Path
) -> None:
    checkpoint = write_checkpoint(tmp_path, moe=True)
    for folder in folders:
        put_in_cache(checkpoint, folder)
    layouts = ["tp=2,ep=2", "dp=2,ep=2", "pp=2"]
    ray = str(Path(sys.executable).parent / "ray")
    driver = start(hosts[0], folders[0], sys.executable, "-c", DRIVER, ray, *layouts)
    join = ["start", "--address=10.213.7.1:6399", "--node-ip-address=10.213.7.2", "--num-cpus=1", "--block"]
    retry = 'until "$@"; do sleep 1; done'  # the head may not be there yet
    other = start(hosts[1], folders[1], "sh", "-c", retry, "sh", ray, *join)
    try:
        printed, complaints = driver.communicate(timeout=240)
    finally:
        for process in (driver, other):
            process.kill()
            process.communicate()
    assert driver.returncode == 0, complaints
    tokens = str(load_reference(checkpoint).generate_greedy([5, 6, 7], 8))
    assert printed.strip().splitlines()[-3:] == [tokens] * 3
