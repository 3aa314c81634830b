"""The Ray Serve instance of the connected cluster: its applications, and conflicts with a new one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from cluster.ray_private import serve_client
from qwen3_dist.errors import ConfigError, ResourceError
from serve_app.settings import ServiceConfig

_SAME_HOST = {"localhost": "127.0.0.1"}


@dataclass(frozen=True)
class RunningApplication:
    """An application of Serve. `deployed_at` tells it from a later deployment under the same name."""

    name: str
    route_prefix: str | None
    deployed_at: float


@dataclass(frozen=True)
class ServeInstance:
    """A running Ray Serve: its address, None if it has no HTTP proxy, and its applications by name."""

    host: str | None
    port: int | None
    applications: dict[str, RunningApplication]
    certfile: str = ""  # empty: HTTP without TLS


def running_serve() -> ServeInstance | None:
    """The Serve of the cluster; None if none runs. Raises RayError while its controller does not answer."""
    client = serve_client()
    if client is None:
        return None
    details = client.get_serve_details()
    http = details.get("http_options") or {}
    applications = {
        name: RunningApplication(name, found.get("route_prefix"), found["last_deployed_time_s"])
        for name, found in details["applications"].items()
    }
    return ServeInstance(http.get("host"), http.get("port"), applications, http.get("ssl_certfile") or "")


def find_application(name: str) -> RunningApplication:
    """The application called `name`. Raises ResourceError if there is none, and the errors of `running_serve`."""
    instance = running_serve()
    if instance is None or name not in instance.applications:
        raise ResourceError(
            f"application {name!r} no longer exists in Ray Serve; something else deleted it; start it again"
        )
    return instance.applications[name]


def check_not_replaced(application: RunningApplication) -> None:
    """Raises ResourceError if the application was deleted, or replaced by another under the same name."""
    if find_application(application.name).deployed_at != application.deployed_at:
        raise ResourceError(
            f"application {application.name!r} was replaced by another deployment of the same name; choose "
            "another --name for this one"
        )


def is_running(application: RunningApplication) -> bool:
    """Whether Serve still runs this deployment of the application."""
    try:
        check_not_replaced(application)
    except (ResourceError, RayError, RayServeException, TimeoutError):
        return False
    return True


def check_no_conflict(config: ServiceConfig, instance: ServeInstance) -> None:
    """Raises ResourceError if `instance` already has an application of the service's names or route prefix, or
    ConfigError if it listens elsewhere than the service should."""
    if taken := [name for name in config.applications if name in instance.applications]:
        raise ResourceError(
            f"this Ray cluster already serves an application named {taken[0]!r}; choose another --name and "
            "--route-prefix, or end that one first with `qwen3-dist stop`"
        )
    require_route(config, instance)
    require_address(config, instance)


def require_route(config: ServiceConfig, instance: ServeInstance) -> None:
    """Raises ResourceError if another service answers below the route prefix."""
    endpoint = config.endpoint
    for other in instance.applications.values():
        if other.route_prefix == endpoint.route_prefix and other.name != endpoint.name:
            raise ResourceError(
                f"application {other.name!r} of this Ray cluster already uses the route prefix "
                f"{endpoint.route_prefix}; "
                "choose another --route-prefix"
            )


def require_address(config: ServiceConfig, instance: ServeInstance) -> None:
    """Raises ConfigError if Serve listens elsewhere than the service should, or with another certificate."""
    endpoint = config.endpoint
    host = _SAME_HOST.get(endpoint.host, endpoint.host)
    if instance.host is not None and (_SAME_HOST.get(instance.host, instance.host), instance.port) != (
        host,
        endpoint.port,
    ):
        raise ConfigError(
            f"Ray Serve of this cluster listens on {instance.host}:{instance.port} for all its applications; give "
            f"--host {instance.host} --port {instance.port}"
        )
    if instance.host is not None and instance.certfile != endpoint.ssl_certfile:
        has = f"uses the certificate {instance.certfile}" if instance.certfile else "speaks HTTP without TLS"
        raise ConfigError(
            f"Ray Serve of this cluster {has} for all its applications; give that --ssl-certfile, or none, or end "
            "Serve first"
        )


def ask_replicas(
    handle: DeploymentHandle, method: str, *arguments: Any, timeout_s: float, return_exceptions: bool = False
) -> list[Any]:
    """What all replicas of a deployment answer to a call. Raises what Serve raises if one is lost or late, or returns
    it in place of the answer.

    In a thread, since Serve does not wait in one that runs an event loop, as notebooks do.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(
            lambda: handle.broadcast(method, *arguments).results(
                timeout_s=timeout_s, return_exceptions=return_exceptions
            )
        ).result()
