"""Starting, joining and leaving a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import ray

from cluster import ray_private
from cluster.ray_guard import RayGuard
from qwen3_dist.errors import ResourceError

_ANSWER_WAIT_S = 5.0
_START_TRIES = 2
_guard: RayGuard | None = None


def connect(address: str | None, num_cpus: int | None = None) -> bool:
    """Joins the Ray cluster at `address` ("auto", or host:port), or starts a local one if it is None.

    A local Ray ends with this process, even if this process is killed. Returns whether one was started. Raises
    ResourceError if nothing answers at `address`, if the cluster refuses our token, or if Ray does not start.
    """
    # Serve's client tells each of its calls at level INFO. It sets this level itself when it is imported, so import it
    # before.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if ray.is_initialized():
        return False
    if address is None:
        _start(num_cpus)
        return True
    _require_answer(address)
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
        ray.shutdown()
        if _is_about_tokens(error):
            raise ResourceError(
                f"the Ray cluster at {address} requires an authentication token that this process did not send; set "
                "RAY_AUTH_MODE=token here and put the cluster's token in ~/.ray/auth_token or RAY_AUTH_TOKEN, or "
                "start both with RAY_AUTH_MODE=disabled"
            ) from None
        if address == "auto":
            raise ResourceError(
                "no Ray runs on this machine; start one with `ray start --head`, or give --ray-address HOST:PORT"
            ) from None
        raise ResourceError(f"no Ray cluster can be joined at {address!r}: {error}") from None
    return False


@contextlib.contextmanager
def joined(address: str) -> Iterator[None]:
    """A context in which this process has joined the cluster at `address`. Raises ResourceError as `connect` does."""
    on_sigterm = signal.getsignal(signal.SIGTERM)
    connect(address)
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own handler would abort this process
    try:
        yield
    finally:
        shutdown()


def shutdown() -> None:
    """Leaves the cluster. A local Ray is ended with all its processes."""
    global _guard
    ray_private.forbid_implicit_start()
    if ray.is_initialized():  # threads of Serve's handles go on, and fail
        logging.getLogger("ray.serve").setLevel(logging.CRITICAL)
    ray.shutdown()
    if _guard is not None:
        _guard.end_all()
        _guard = None


def _require_home() -> None:
    try:
        Path.home()
    except RuntimeError:
        raise ResourceError(
            "this user has no home directory and Ray needs one; set HOME to a directory that it can write to"
        ) from None


def _start(num_cpus: int | None) -> None:
    """Starts a local Ray, with one retry. Raises ResourceError."""
    global _guard
    _require_home()
    for name, value in ray_private.CLUSTER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for tries_left in reversed(range(_START_TRIES)):
        _guard = RayGuard()
        try:
            with _guard.watching_children(), ray_private.own_process_groups():
                ray.init(
                    address="local",  # else Ray joins the last cluster that `ray start` has noted, also a dead one
                    num_cpus=num_cpus,
                    include_dashboard=False,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                )
            return
        except Exception as error:  # noqa: BLE001 - Ray raises bare Exceptions here
            shutdown()
            if tries_left == 0:
                reason = str(error).strip().partition("\n")[0]
                raise ResourceError(
                    f"Ray did not start on this machine in {_START_TRIES} tries ({reason}); end other programs, or "
                    "start Ray with `ray start --head` and join it with --ray-address"
                ) from None


def _is_about_tokens(error: BaseException | None) -> bool:
    """Whether the error or one of its causes is a refused token."""
    while error is not None:
        if isinstance(error, ray.exceptions.AuthenticationError) or "InvalidAuthToken" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _require_answer(address: str) -> None:
    """Raises ResourceError unless something listens at `address`: ray.init would wait much longer."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "//" in address:
        return
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_WAIT_S).close()
    except OSError as error:
        raise ResourceError(f"no Ray cluster answers at {address} ({error}); check --ray-address") from None
