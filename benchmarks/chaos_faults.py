"""What `benchmarks.chaos` does to a service."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from typing import Any

import httpx
from ray.cluster_utils import Cluster

from benchmarks.processes import is_stopped, started
from serve_app.launch.deploy import deploy
from serve_app.settings import INGRESS, REPLICA, read_service_config

FAULTS = (
    *("none", "kill-rank", "stop-rank", "kill-replica", "stop-replica", "term-replica", "kill-ingress"),
    *("kill-proxy", "kill-controller", "drop", "roll", "layout", "scale"),
)
_GROUPS_S = 300.0  # for a dp group to leave and to come back
_NODE: dict[str, Any] = {"num_cpus": 1, "include_dashboard": False}


def titled(words: str, root: int | None = None) -> list[int]:
    """Processes that `root`, this process by default, has started and nobody has stopped, of whose titles `words` is a
    part."""
    return [pid for pid, title in started(root).items() if words in title and not is_stopped(pid)]


TITLES = {
    "replica": f":{REPLICA}",
    "ingress": f":{INGRESS}",
    "proxy": "ProxyActor",
    "controller": "ServeController",
}


def _sleep(seconds: float, deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"no dp group left and came back within {_GROUPS_S:g} s")
    time.sleep(seconds)


def _signal(kind: str, ranks: list[list[int]]) -> None:
    """Sends the signal that `kind` names to one process."""
    action, _, what = kind.partition("-")
    number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}[action]
    pids = random.choice(ranks) if what == "rank" else titled(TITLES[what])
    os.kill(random.choice(pids), number)


def _sockets(state: str, pid: int) -> list[tuple[str, str]]:
    """The local and the peer's port of each TCP socket of a process in `state`."""
    lines = subprocess.run(["ss", "-tnpH", "state", state], capture_output=True, text=True, check=True).stdout
    columns = [line.split() for line in lines.splitlines() if f"pid={pid}," in line]
    return [(local.rpartition(":")[2], peer.rpartition(":")[2]) for _, _, local, peer, *_ in columns]


def _drop() -> None:
    """Breaks all connections between one ingress and one replica."""
    ingress, replica = (random.choice(titled(TITLES[each])) for each in ("ingress", "replica"))
    served = {port for port, _ in _sockets("listening", replica)}
    found = [port for port, peer in _sockets("established", ingress) if peer in served]
    for port in found:
        subprocess.run(["ss", "-K", "sport", "=", port], capture_output=True, check=True)
    left = {port for port, _ in _sockets("established", ingress)}
    assert found and not left & set(found), "ss did not close the connections"


def _raylet_of(node: Any) -> subprocess.Popen[bytes]:
    process: subprocess.Popen[bytes] = node.all_processes["raylet"][0].process
    return process


class Nodes:
    """Ray nodes on this machine, beside a head without CPUs, with room for one replica each."""

    def __init__(self, number: int) -> None:
        self._cluster = Cluster(initialize_head=True, head_node_args={**_NODE, "num_cpus": 0})
        self._raylets = [_raylet_of(self._cluster.add_node(**_NODE)) for _ in range(number)]
        self.address: str = self._cluster.address

    def kill_one(self) -> None:
        """Kills the raylet of a node that has a replica, with which the node's other processes end, once nobody can
        take the raylet for one that lives."""
        raylet = next(each for each in self._raylets if titled(TITLES["replica"], each.pid))
        self._raylets.remove(raylet)
        raylet.kill()
        raylet.wait()

    def end(self) -> None:
        self._cluster.shutdown()


class Service:
    """The service that is disturbed. `change` deploys it with other settings."""

    def __init__(self, settings: dict[str, Any], nodes: Nodes | None) -> None:
        self._settings, self._nodes = settings, nodes
        self.url = self.change()

    def strike(self, kind: str, ranks: list[list[int]]) -> None:
        """One fault. `ranks` are the processes of each replica's ranks."""
        if kind in ("roll", "layout", "scale"):
            getattr(self, kind)()
        elif kind == "groups":
            self.groups(ranks)
        elif kind == "drop":
            _drop()
        elif kind == "kill-raylet":
            assert self._nodes, "kill-raylet needs --nodes"
            self._nodes.kill_one()
        elif kind != "none":
            _signal(kind, ranks)

    def change(self, **settings: Any) -> str:
        self._settings |= settings
        return deploy(read_service_config(self._settings), report=print)

    def roll(self) -> None:
        """Loads the model anew, for one KV block more."""
        self.change(num_blocks=self._settings["num_blocks"] + 1)

    def layout(self) -> None:
        """Loads the model with one rank, and again with its layout."""
        usual = self._settings["layout"]
        for layout in ("tp=1", usual):
            self.change(layout=layout)

    def groups(self, ranks: list[list[int]]) -> None:
        """Kills a rank, and those that start in its place, until its replica goes on without its dp group; then waits
        until the replica has it again. Raises TimeoutError if either takes too long."""
        deadline = time.monotonic() + _GROUPS_S
        known = {pid for pids in ranks for pid in pids}
        os.kill(random.choice(random.choice(ranks)), signal.SIGKILL)
        while not self._lacks_ranks():
            for pid in set(titled("RankActor")) - known:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            _sleep(0.05, deadline)
        while self._lacks_ranks():
            _sleep(0.5, deadline)

    def _lacks_ranks(self) -> bool:
        """Whether a replica goes without ranks."""
        view = httpx.get(f"{self.url}/v1/cluster", timeout=15).json()
        return any(each.get("absence") for model in view["models"] for each in model["replicas"])

    def scale(self) -> None:
        """Takes a replica away, and gives it back."""
        replicas = self._settings["min_replicas"]
        for number in (replicas - 1, replicas):
            self.change(min_replicas=number, max_replicas=number)
