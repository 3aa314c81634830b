"""The state of the services of a Ray cluster, as Ray Serve reports it."""

from __future__ import annotations

from dataclasses import dataclass

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from qwen3_dist.errors import ResourceError
from serve_app.launch.serve_instance import ask_replicas, running_serve
from serve_app.replica_status import ReplicaStatus
from serve_app.settings import REPLICA
from serve_app.waiting import unplaced_bundles

_ANSWER_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class ApplicationState:
    """One application of Serve: a service's gateway, or one of its models.

    `waits_for`: the bundles for which the cluster has no room, and the resource that they lack, as text.
    """

    name: str
    status: str
    route_prefix: str | None
    running: int
    starting: int
    message: str
    waits_for: str


def application_states() -> list[ApplicationState]:
    """The applications of the cluster's Serve by name; none if no Serve runs. Raises ResourceError if Serve does not
    answer."""
    instance = running_serve()
    if instance is None:
        return []
    try:
        statuses = serve.status().applications
    except (RayError, RayServeException, TimeoutError) as error:
        raise ResourceError(f"Ray Serve does not answer ({error}); ask again in a moment") from None
    found = []
    for name, status in sorted(statuses.items()):
        states: dict[str, int] = {}
        messages = [status.message]
        for deployment in status.deployments.values():
            messages.append(deployment.message)
            for state, count in deployment.replica_states.items():
                states[state] = states.get(state, 0) + count
        messages += _absences(name) if REPLICA in status.deployments and states.get("RUNNING") else []
        known = instance.applications.get(name)
        found.append(
            ApplicationState(
                name,
                str(status.status.value),
                known.route_prefix if known else None,
                states.get("RUNNING", 0) + states.get("UPDATING", 0),
                states.get("STARTING", 0) + states.get("PENDING_MIGRATION", 0),
                "; ".join(message.strip().splitlines()[-1] for message in messages if message.strip()),
                unplaced_bundles(name, REPLICA),
            )
        )
    return found


def _absences(application: str) -> list[str]:
    """Which ranks each replica of a model goes without, and why; of replicas that answer and lack some."""
    handle = serve.get_deployment_handle(REPLICA, application)
    try:
        told = ask_replicas(handle, "status", timeout_s=_ANSWER_TIMEOUT_S, return_exceptions=True)
    except (RayError, RayServeException, TimeoutError):
        return []
    statuses = [each for each in told if isinstance(each, ReplicaStatus)]
    return [f"{each.replica} {each.absence}" for each in statuses if each.absence]
