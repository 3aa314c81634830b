"""The Ray Serve of the connected cluster: what it runs, and whether a service has a place there."""

from __future__ import annotations

from dataclasses import dataclass

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.util import placement_group_table

from cluster.ray_private import replica_name_prefix, serve_client
from qwen3_dist.errors import ConfigError, ResourceError
from serve_app.settings import ServiceConfig

_SAME_HOST = {"localhost": "127.0.0.1"}


@dataclass(frozen=True)
class RunningApplication:
    """An application of Serve. Another deployment of its name has another time."""

    name: str
    route_prefix: str | None
    deployed_at: float


@dataclass(frozen=True)
class ServeInstance:
    """A running Ray Serve: where it listens (None: nowhere) and what it runs."""

    host: str | None
    port: int | None
    applications: dict[str, RunningApplication]


def running_serve() -> ServeInstance | None:
    """The cluster's Serve; None if none runs. Raises RayError while its controller cannot be asked."""
    client = serve_client()
    if client is None:
        return None
    details = client.get_serve_details()
    http = details.get("http_options") or {}
    applications = {
        name: RunningApplication(name, found.get("route_prefix"), found["last_deployed_time_s"])
        for name, found in details["applications"].items()
    }
    return ServeInstance(http.get("host"), http.get("port"), applications)


def find_application(name: str) -> RunningApplication:
    """The application of that name. Raises ResourceError if there is none, RayError as `running_serve` does."""
    instance = running_serve()
    if instance is None or name not in instance.applications:
        raise ResourceError(
            f"application {name!r} is gone from Ray Serve, so somebody else deleted it; start it again"
        )
    return instance.applications[name]


def require_same(application: RunningApplication) -> None:
    """Raises ResourceError if the application is gone, or another was deployed under its name."""
    if find_application(application.name).deployed_at != application.deployed_at:
        raise ResourceError(
            f"application {application.name!r} was replaced by another deployment of that name, which goes on; choose "
            "another --name for this one"
        )


def is_running(application: RunningApplication) -> bool:
    """Whether Serve still has the application, and not another of its name."""
    try:
        require_same(application)
    except (ResourceError, RayError, RayServeException, TimeoutError):
        return False
    return True


def require_place(config: ServiceConfig, instance: ServeInstance) -> None:
    """Raises ResourceError if `instance` already has an application of the service's name or route prefix, or
    ConfigError if it listens elsewhere than the service should."""
    if config.name in instance.applications:
        raise ResourceError(
            f"this Ray cluster already serves an application named {config.name!r}; choose another --name and "
            "--route-prefix, or end that one first, by ray.serve.delete() if its `serve` was killed"
        )
    for other in instance.applications.values():
        if other.route_prefix == config.route_prefix:
            raise ResourceError(
                f"application {other.name!r} of this Ray cluster already answers below {config.route_prefix}; choose "
                "another --route-prefix"
            )
    host = _SAME_HOST.get(config.host, config.host)
    if instance.host is not None and (_SAME_HOST.get(instance.host, instance.host), instance.port) != (
        host,
        config.port,
    ):
        raise ConfigError(
            f"Ray Serve of this cluster listens on {instance.host}:{instance.port} for all its applications; give "
            f"--host {instance.host} --port {instance.port}"
        )


def unplaced_bundles(name: str, deployment: str) -> str:
    """The bundles of a replica of application `name` that waits for resources, as text; "" if none does."""
    beginning = replica_name_prefix(name, deployment)
    for group in placement_group_table().values():
        if group["state"] == "PENDING" and group["name"].startswith(beginning):
            return ", ".join(str(bundle) for bundle in group["bundles"].values())
    return ""
