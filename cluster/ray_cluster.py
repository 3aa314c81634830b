"""Starting, joining and leaving a Ray cluster."""

from __future__ import annotations

import logging
import os
import socket

import ray

from qwen3_dist.errors import ResourceError

_ANSWER_WAIT_S = 5.0
# How Serve's proxy talks to deployments: by gRPC a streamed token costs it less than half. Serve has no other
# setting for it; processes of a cluster inherit it from whoever starts them.
_PROXY_BY_GRPC = "RAY_SERVE_PROXY_USE_GRPC"


def connect(address: str | None, num_cpus: int | None = None) -> bool:
    """Joins the Ray cluster at `address` ("auto", or host:port), or starts a local one for None.

    Returns whether it was started here. Raises ResourceError if nobody answers at `address`.
    """
    if ray.is_initialized():
        return False
    if address is None:
        os.environ.setdefault(_PROXY_BY_GRPC, "1")
        ray.init(num_cpus=num_cpus, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
        return True
    _require_answer(address)
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ResourceError(f"no Ray cluster can be joined at {address!r}: {error}") from None
    return False


def shutdown() -> None:
    """Leaves the cluster; one started here ends with all its processes."""
    ray.shutdown()


def _require_answer(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "//" in address:
        return
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_WAIT_S).close()
    except OSError as error:
        raise ResourceError(f"no Ray cluster answers at {address} ({error}); check --ray-address") from None
