"""Waits for the nodes of a Ray cluster, and drains the node of this machine, for scripts that start and end nodes.

python -m cluster.nodes wait HOST:PORT 2 --timeout-s 300
python -m cluster.nodes drain --timeout-s 600
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import ray

from cluster import ray_private
from cluster.ray_cluster import joined
from qwen3_dist.errors import QwenDistError, ResourceError

_POLL_S = 0.5
_HEAD = "node:__internal_head__"  # Ray's resource of the head node
# Actors of Serve that end with the cluster only.
_OF_THE_CLUSTER = ("ServeController", "ProxyActor", "HTTPProxyActor")


def wait_for_nodes(address: str, count: int, timeout_s: float) -> None:
    """Waits until the Ray cluster at `address` has `count` nodes. Raises ResourceError after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with joined(address):
                _wait(lambda: _alive() >= count, deadline)
                if _alive() >= count:
                    return
                raise ResourceError(
                    f"the Ray cluster at {address} has {_alive()} of {count} nodes after {timeout_s:g} s; see the "
                    "output of the nodes that are missing"
                )
        except ResourceError:  # it does not listen yet
            if time.monotonic() > deadline:
                raise
        time.sleep(_POLL_S)


def drain_this_node(timeout_s: float) -> bool:
    """Drains the node of the Ray that runs on this machine, see `drain`. Raises ResourceError."""
    with joined("auto"):
        return drain(ray.get_runtime_context().get_node_id(), timeout_s)


def drain(node: str, timeout_s: float) -> bool:
    """Has Ray place nothing more on a node of the connected cluster, and waits until Serve has moved or ended what
    runs there.

    Serve starts replicas elsewhere where there is room, and lets running requests end. The head, whose end is the
    cluster's, is not drained: it waits for the other nodes. Returns whether nothing runs any more after at most
    `timeout_s` seconds. Raises ResourceError if Ray refuses.
    """
    deadline = time.monotonic() + timeout_s
    is_head = _HEAD in next(each["Resources"] for each in ray.nodes() if each["NodeID"] == node)
    if not is_head:
        ray_private.drain_node(node, timeout_s)

    def is_empty() -> bool:
        return not any(
            (place != node if is_head else place == node) and kind not in _OF_THE_CLUSTER
            for place, kind in ray_private.living_actors()
        )

    _wait(is_empty, deadline)
    return is_empty()


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns 1, with one sentence on stderr, for a QwenDistError or a node that is not empty."""
    parser = argparse.ArgumentParser(prog="python -m cluster.nodes")
    commands = parser.add_subparsers(dest="command", required=True)
    wait = commands.add_parser("wait", help="wait until a Ray cluster has so many nodes")
    wait.add_argument("address")
    wait.add_argument("count", type=int)
    wait.add_argument("--timeout-s", type=float, default=300.0)
    drain = commands.add_parser("drain", help="end what runs on this machine's node")
    drain.add_argument("--timeout-s", type=float, default=600.0)
    args = parser.parse_args(argv)
    try:
        if args.command == "wait":
            wait_for_nodes(args.address, args.count, args.timeout_s)
            return 0
        if drain_this_node(args.timeout_s):
            return 0
        reason = f"replicas still run on this node after {args.timeout_s:g} s"
    except QwenDistError as error:
        reason = str(error)
    print(f"{parser.prog}: {reason}", file=sys.stderr)
    return 1


def _wait(done: Callable[[], bool], deadline: float) -> None:
    while not done() and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _alive() -> int:
    return sum(node["Alive"] for node in ray.nodes())


if __name__ == "__main__":
    sys.exit(main())
