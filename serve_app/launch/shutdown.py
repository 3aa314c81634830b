"""Ends one application of Ray Serve: its requests first, then itself, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from cluster.ray_private import delete_application
from serve_app.launch.serve_instance import RunningApplication, is_running

_POLL_S = 0.2
_ANSWER_S = 5.0
_LATE_S = 3.0  # for the errors of requests whose time is up
_LAST_BYTES_S = 0.3  # from the ingress over Serve's proxy into the clients' sockets
_DELETE_S = 60.0


def drain(
    ingress: DeploymentHandle,
    timeout_s: float,
    report: Callable[[str], None],
    hurry: Callable[[], bool],
) -> None:
    """Has the ingress refuse new requests, and waits until the running ones have ended or been ended.

    They are ended in `timeout_s` seconds, or as soon as `hurry` says so.
    """
    deadline = time.monotonic() + timeout_s
    answered = time.monotonic()
    told = False
    while (now := time.monotonic()) < deadline + _LATE_S:
        if hurry():
            deadline = min(deadline, now)
        running = _ask_to_drain(ingress, max(0.0, deadline - now))
        if running == 0:
            break
        if running is not None:
            answered = now
            if not told:
                told = True
                report(
                    f"{running} sequence(s) run and have {timeout_s:g} s to end, new requests are refused; another "
                    "Ctrl-C or SIGTERM ends them at once"
                )
        elif now - answered > _ANSWER_S:
            break  # no ingress is left that could
        time.sleep(_POLL_S)
    time.sleep(_LAST_BYTES_S)


def delete(application: RunningApplication, hurry: Callable[[], bool]) -> None:
    """Deletes the application and waits until it is gone, a minute at most and no longer once `hurry` says so."""
    delete_application(application.name)
    deadline = time.monotonic() + _DELETE_S
    while is_running(application) and not hurry() and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def end_unused_serve() -> None:
    """Ends the cluster's Serve, unless other applications run in it: those that joined it need it."""
    try:
        applications = serve.status().applications.values()
    except (RayError, RayServeException, TimeoutError):
        return  # no controller answers, so none could end it
    if all(application.status == ApplicationStatus.DELETING for application in applications):
        serve.shutdown()


def _ask_to_drain(ingress: DeploymentHandle, timeout_s: float) -> int | None:
    """Sequences that still run; None if no ingress can be asked."""
    try:
        running = ingress.broadcast("drain", timeout_s).results(timeout_s=_ANSWER_S)
    except Exception:  # noqa: BLE001 - whatever keeps it from answering, the service is to end
        return None
    return sum(running) if running else None
