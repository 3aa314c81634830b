"""Graceful shutdown of a service: drains its ingress, deletes its applications, ends Ray Serve if it is unused."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from cluster.ray_private import delete_application
from serve_app.launch.serve_instance import RunningApplication, ask_replicas, is_running

_POLL_S = 0.2
_ANSWER_S = 5.0
_LATE_S = 3.0  # extra time for requests to be answered with an error after the deadline
_LAST_BYTES_S = 0.3  # for the last bytes to reach the clients over Serve's proxy
_DELETE_S = 60.0


def drain(
    ingress: DeploymentHandle,
    timeout_s: float,
    report: Callable[[str], None],
    stop_now: Callable[[], bool],
) -> None:
    """Has the ingress refuse new requests and end running ones after `timeout_s` seconds, or once `stop_now()` is
    true.

    Returns when none runs.
    """
    deadline = time.monotonic() + timeout_s
    last_answer = time.monotonic()
    reported = False
    while (now := time.monotonic()) < deadline + _LATE_S:
        if stop_now():
            deadline = min(deadline, now)
        running = _ask_to_drain(ingress, max(0.0, deadline - now))
        if running == 0:
            break
        if running is not None:
            last_answer = now
            if not reported:
                reported = True
                report(
                    f"refusing new requests; {running} running sequence(s) have {timeout_s:g} s to end; another "
                    "Ctrl-C or SIGTERM ends them at once"
                )
        elif now - last_answer > _ANSWER_S:
            break  # no ingress is left
        time.sleep(_POLL_S)
    time.sleep(_LAST_BYTES_S)


def delete(applications: Sequence[RunningApplication], stop_now: Callable[[], bool]) -> None:
    """Deletes the applications. Waits until they are gone, for at most a minute or until `stop_now()` is true."""
    for application in applications:
        delete_application(application.name)
    deadline = time.monotonic() + _DELETE_S
    while any(map(is_running, applications)) and not stop_now() and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def end_unused_serve() -> None:
    """Shuts Serve down unless other applications run in it."""
    try:
        applications = serve.status().applications.values()
    except (RayError, RayServeException, TimeoutError):
        return  # without a controller Serve cannot be shut down
    if all(application.status == ApplicationStatus.DELETING for application in applications):
        serve.shutdown()


def _ask_to_drain(ingress: DeploymentHandle, timeout_s: float) -> int | None:
    """Tells all ingresses to drain. Returns the running sequences of those that answer; None if none does."""
    try:
        answers = ask_replicas(ingress, "drain", timeout_s, timeout_s=_ANSWER_S, return_exceptions=True)
    except Exception:  # noqa: BLE001 - shutdown goes on whatever the error is
        return None
    running = [each for each in answers if not isinstance(each, BaseException)]
    return sum(running) if running else None
