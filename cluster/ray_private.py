"""Every name of Ray and Ray Serve that Ray does not promise to keep, with the reason for each.

`cluster` and `serve_app` share this module, so that a new version of Ray needs checking in one place. TESTED_WITH is
the version these names were checked with. A name that is gone raises ResourceError; a setting that is gone has no
effect, which tests/cluster/test_ray_private.py finds. Ray Serve is imported only in functions that need it.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import ray

from qwen3_dist.errors import ResourceError

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

TESTED_WITH = "2.60.0"

# Environment of a Ray cluster that is started here; its processes inherit it. Ray has no other place for these.
CLUSTER_ENVIRONMENT = {
    # Serve's proxy talks to deployments by gRPC: a streamed token costs less than half.
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    # By default Ray runs its workers at nice 15, where any busy program of the host starves ranks and HTTP.
    "RAY_worker_niceness": "0",
}

# Environment of the actors of our deployments. Neither deployment ever blocks its event loop, so one loop does what
# Serve has three for (its own, the router's and the deployment's): an item that crosses fewer threads costs less.
DEPLOYMENT_ENVIRONMENT = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # Requests and answers between deployments may be as large as gRPC can count; the default limit is 4 MiB.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
}

# Names a function that returns middlewares for Serve's HTTP proxies: an overloaded service refuses requests there.
PROXY_MIDDLEWARES = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
# "1" puts the HAProxy that ray[serve] brings before the ingress, in place of Serve's own proxy.
HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"

_REPLICA_NAME = "SERVE_REPLICA::{}#{}#"


@contextlib.contextmanager
def own_process_groups() -> Iterator[None]:
    """A context in which each process of Ray that is started leads a process group of its own.

    A signal to this process's group, as `timeout` and terminals send it, then reaches this process alone, which ends
    its requests first. Without it, Ray would be gone before.
    """
    services = importlib.import_module("ray._private.services")
    original: Any = _find("ray._private.services", "ConsolePopen")

    class Popen(original):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options, process_group=0)

    services.ConsolePopen = Popen  # type: ignore[attr-defined]
    try:
        yield
    finally:
        services.ConsolePopen = original  # type: ignore[attr-defined]


def check_serve() -> None:
    """Raises ResourceError if this version of Ray Serve lacks a name that the service needs."""
    _find("ray.serve.context", "_get_global_client")
    _find("ray.serve.context", "_set_global_client")
    _find("ray.serve._private.handle_options", "DynamicHandleOptions", "_by_reference")
    queue = _find("ray.serve._private.http_util", "MessageQueue")()
    if not hasattr(queue, "_message_queue"):
        raise _gone("ray.serve._private.http_util.MessageQueue()._message_queue")


def serve_client() -> Any:
    """The client of the cluster's running Serve, or None. `get_serve_details` tells hosts, ports and route prefixes,
    which `serve.status` leaves out. Raises RayError while Serve's controller cannot be asked."""
    from ray.serve import context

    return context._get_global_client(raise_if_no_controller_running=False)


def forget_serve() -> None:
    """Makes this process forget the Serve it spoke to. Serve would take the Serve of the next Ray cluster of this
    process for the last one's, since both clusters give their job the same id."""
    from ray.serve import context

    context._set_global_client(None)


def delete_application(name: str) -> None:
    """Begins to delete an application of Serve. `serve.delete` alone would wait without a limit."""
    from ray import serve

    serve.delete(name, _blocking=False)


def stream_by_grpc(handle: DeploymentHandle, method: str) -> DeploymentHandle:
    """The handle for streamed calls of `method` whose values travel by gRPC, at a third of the cost of a stream of
    Ray's objects."""
    return handle.options(
        method_name=method,
        stream=True,
        _by_reference=False,
        request_serialization="pickle",
        response_serialization="pickle",
    )


def unsent_messages(send: Any) -> Collection[Any] | None:
    """The ASGI messages given to `send` that Serve has not passed on yet; None if `send` is not Serve's queue.

    Serve's `send` puts messages on a queue and never waits, so an answer would be computed and held in memory as fast
    as the engine goes, however slowly its client reads. With HAProxy `send` waits and has no queue.
    """
    for cell in getattr(send, "__closure__", None) or ():
        queue = getattr(cell.cell_contents, "_message_queue", None)
        if queue is not None:
            return queue
    return None


def replica_name_prefix(application: str, deployment: str) -> str:
    """The beginning of the names that Serve gives the actors and placement groups of a deployment."""
    return _REPLICA_NAME.format(application, deployment)


def _find(module: str, *path: str) -> Any:
    """The object at `path` in a module of Ray. Raises ResourceError if there is none."""
    try:
        found: Any = importlib.import_module(module)
        for name in path:
            found = getattr(found, name)
    except (ImportError, AttributeError):
        raise _gone(".".join((module, *path))) from None
    return found


def _gone(name: str) -> ResourceError:
    return ResourceError(
        f"ray {ray.__version__} has no {name}, which qwen3-dist needs; it was tested with ray {TESTED_WITH}: "
        f"pip install 'ray[serve]=={TESTED_WITH}'"
    )
