"""All uses of private names and undocumented settings of Ray and Ray Serve, with the reason for each.

A new version of Ray needs checking only here. TESTED_WITH is the version that was checked. A missing name raises
ResourceError. A setting that Ray dropped would silently have no effect, so tests/cluster/test_ray_private.py checks
them. Ray Serve is imported only in functions that need it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import time
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

import ray

from qwen3_dist.errors import ResourceError

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

TESTED_WITH = "2.60.0"

# Environment of a local Ray, which its processes inherit. Ray has no public API for these settings.
CLUSTER_ENVIRONMENT = {
    # Serve's proxy talks to deployments over gRPC, which more than halves the cost of a streamed token.
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # a dead proxy is replaced after three; by default after 30 s
    # A node whose raylet does not answer is lost after five checks, by default 3 s apart. Until then Ray may block who
    # answered one of its processes.
    "RAY_health_check_period_ms": "1000",
    # Ray's default is nice 15, at which any busy program of the host starves ranks and HTTP.
    "RAY_worker_niceness": "0",
}

# Environment of the actors of our deployments. Serve runs three event loops in three threads: its own, the router's
# and the deployment's. Our deployments never block theirs, so one loop suffices, and items cross fewer threads.
DEPLOYMENT_ENVIRONMENT = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # Whoever sends requests counts them for scaling (`count_request`). A later version may change the default.
    "RAY_SERVE_COLLECT_AUTOSCALING_METRICS_ON_HANDLE": "1",
    # The largest message that gRPC allows; the default is 4 MiB.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
}

# Environment variable with the import path of a function that returns middlewares for Serve's HTTP proxies.
PROXY_MIDDLEWARES = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
# Environment variable: "1" uses the HAProxy of ray[serve] instead of Serve's own proxy.
HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"

_REPLICA_NAME = "SERVE_REPLICA::{}#{}#"
_SIGTERM = "ray._private.worker", "raise_sys_exit_with_custom_error_message"  # what Ray's handler calls


@contextlib.contextmanager
def own_process_groups() -> Iterator[None]:
    """A context in which each process that Ray starts gets its own process group.

    A signal to this process's group, as terminals and `timeout` send it, then reaches this process only, which can end
    its requests before it ends Ray.
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
    """Raises ResourceError if this version of Ray Serve lacks a private name that the service uses."""
    _find("ray._private.auto_init_hook", "enable_auto_connect")
    _find("ray._private.state", "available_resources_per_node")
    _find(*_SIGTERM)
    _find("ray.serve.context", "_get_global_client")
    _find("ray.serve.context", "_set_global_client")
    _find("ray.serve._private.router", "AsyncioRouter", "request_router")
    _find("ray.serve._private.router", "RouterMetricsManager", "inc_num_running_requests_for_replica")
    _find("ray.serve._private.router", "RouterMetricsManager", "dec_num_running_requests_for_replica")
    _find("ray.serve._private.request_router", "RequestRouter", "curr_replicas")
    _find("ray.serve.handle", "DeploymentHandle", "_init_router")
    _find("ray.serve.handle", "DeploymentBroadcastResponse", "_fetch_replica_results_async")
    queue = _find("ray.serve._private.http_util", "MessageQueue")()
    if not hasattr(queue, "_message_queue"):
        raise _gone("ray.serve._private.http_util.MessageQueue()._message_queue")


def serve_client() -> Any:
    """The client of the cluster's Serve; None if it does not run. Raises RayError while its controller does not
    answer.

    Unlike `serve.status`, its `get_serve_details` has hosts, ports and route prefixes.
    """
    from ray.serve import context

    return context._get_global_client(raise_if_no_controller_running=False)


def forbid_implicit_start() -> None:
    """Makes calls of Ray fail in a process that is in no cluster. By default they join the last cluster that somebody
    has noted on this machine, or start one: also those of threads of Serve's handles that outlive `ray.shutdown`."""
    from ray._private import auto_init_hook

    auto_init_hook.enable_auto_connect = False


def forget_serve() -> None:
    """Drops Serve's cached client. Otherwise a process that connects to another Ray cluster would use the client of
    the previous one, since Serve compares job ids, which are the same in both clusters."""
    from ray.serve import context

    context._set_global_client(None)


def delete_application(name: str) -> None:
    """Starts to delete an application of Serve. The public `serve.delete` would block without a timeout."""
    from ray import serve

    serve.delete(name, _blocking=False)


def apply_serve_config(config: Any) -> None:
    """Gives Serve's controller a ServeDeploySchema, as `serve deploy` does over the dashboard, which may not run."""
    serve_client().deploy_apps(config)


def drain_node(node: str, timeout_s: float) -> None:
    """Has Ray place nothing more on a node, given by its hex id, and Serve move its replicas away within `timeout_s`.

    The command `ray drain-node` does so too, and takes about a second longer. Raises ResourceError if Ray refuses.
    """
    reasons = importlib.import_module("ray.core.generated.autoscaler_pb2").DrainNodeReason
    client = _find("ray._raylet", "GcsClient")(address=ray.get_runtime_context().gcs_address)
    deadline_ms = int((time.time() + timeout_s) * 1000)
    reason = reasons.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, refusal = client.drain_node(node, reason, "the node is being stopped", deadline_ms)
    if not accepted:
        raise ResourceError(f"Ray does not drain this node: {refusal}")


def living_actors() -> list[tuple[str, str]]:
    """The node, by its hex id, and the class of each living actor. `ray.util.state` would need the dashboard."""
    actors = _find("ray._private.state", "actors")().values()
    return [
        (actor["Address"]["NodeID"], actor["ActorClassName"]) for actor in actors if actor["State"] == "ALIVE"
    ]


def free_resources() -> list[dict[str, float]]:
    """What is free on each node. `ray.available_resources` has the sums alone."""
    per_node: dict[str, dict[str, float]] = _find("ray._private.state", "available_resources_per_node")()
    return [dict(free) for free in per_node.values()]


def deployment_handle(deployment: str, application: str) -> DeploymentHandle:
    """The handle of a deployment, also before Serve has registered it: applications of one config come up in any
    order, and `serve.get_deployment_handle` alone would raise KeyError."""
    from ray import serve

    return serve.get_deployment_handle(deployment, application, _check_exists=False)


def running_replicas(handle: DeploymentHandle) -> tuple[str, ...]:
    """The ids of a deployment's running replicas, as this process was last told; none before it was told.

    The context's `world_size` is the setting `num_replicas`: it does not follow autoscaling, nor deaths. Call this on
    the event loop of the process, on which the handle's router runs.
    """
    router = _router(handle).request_router
    return tuple(replica.unique_id for replica in router.curr_replicas) if router else ()


def count_request(handle: DeploymentHandle, replica: str) -> Callable[[], None]:
    """Has Serve's scaling count a request at the replica with this id as if the handle had sent it, until what this
    returns is called. Serve has no public way to tell it of requests that do not pass through it."""
    router = _router(handle)
    metrics = router._metrics_manager
    for replica_id in router.request_router.curr_replicas:
        if replica_id.unique_id == replica:
            metrics.inc_num_running_requests_for_replica(replica_id)
            return functools.partial(metrics.dec_num_running_requests_for_replica, replica_id)
    return lambda: None


def _router(handle: DeploymentHandle) -> Any:
    return handle._init_router()._asyncio_router  # type: ignore[attr-defined]


async def broadcast(handle: DeploymentHandle, method: str, *arguments: Any, timeout_s: float) -> list[Any]:
    """What all running replicas of a deployment answer to a call, in any order: for one that is lost, or later than
    `timeout_s` seconds, an exception. Raises what Serve raises if it could ask nobody.

    Serve's own `results_async` gives up on all of them when one is late, and its `results` needs a thread for each.
    """
    sent = handle.broadcast(method, *arguments)
    results = await asyncio.wait_for(sent._fetch_replica_results_async(), timeout_s)

    async def answer(result: Any) -> Any:
        return await asyncio.wait_for(result.get_async(), timeout_s)

    return await asyncio.gather(*map(answer, results), return_exceptions=True)


def unsent_messages(send: Any) -> Collection[Any] | None:
    """The ASGI messages given to `send` that Serve has not passed on yet; None if `send` is not Serve's queue.

    Serve's `send` puts messages on a queue and never waits, so that the answers of slow clients would pile up in
    memory. With HAProxy `send` waits and has no queue.
    """
    for cell in getattr(send, "__closure__", None) or ():
        queue = getattr(cell.cell_contents, "_message_queue", None)
        if queue is not None:
            return queue
    return None


def on_sigterm(act: Callable[[], object]) -> None:
    """Has SIGTERM call `act` in this process of an actor, and no more. By default the process would first wait for the
    calls that it has made, as of its ranks, which go on until it ends them.

    Python sets handlers of signals in a process's main thread alone, where Ray runs its loop. So this replaces what
    Ray's handler calls.
    """
    module, name = _SIGTERM
    _find(module, name)
    setattr(importlib.import_module(module), name, lambda *message, **exit_code: act())


def user_config() -> dict[str, Any]:
    """The user_config of the deployment whose replica this process is, which Serve hands over after its constructor
    only."""
    from ray import serve

    return serve.get_replica_context()._deployment_config.user_config or {}


def logs_directory() -> str:
    """The directory of the Ray session's logs on this process's node."""
    worker: Any = importlib.import_module("ray._private.worker")
    directory: str = worker._global_node.get_logs_dir_path()
    return directory


def replica_name_prefix(application: str, deployment: str) -> str:
    """The prefix of the names that Serve gives the actors and placement groups of a deployment."""
    return _REPLICA_NAME.format(application, deployment)


def _find(module: str, *path: str) -> Any:
    """The attribute at `path` in a module of Ray. Raises ResourceError if it does not exist."""
    try:
        value: Any = importlib.import_module(module)
        for name in path:
            value = getattr(value, name)
    except (ImportError, AttributeError):
        raise _gone(".".join((module, *path))) from None
    return value


def _gone(name: str) -> ResourceError:
    return ResourceError(
        f"ray {ray.__version__} has no {name}, which qwen3-dist needs; it was tested with ray {TESTED_WITH}: "
        f"pip install 'ray[serve]=={TESTED_WITH}'"
    )
