"""A service that lives as long as one process, as `qwen3-dist serve` runs it: deploys, watches, shuts down."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from cluster import ray_cluster, ray_private
from qwen3_dist.errors import ResourceError
from serve_app.app import QUIET_LOGGING, applications
from serve_app.ingress import proxy
from serve_app.launch.checks import (
    check_device,
    check_files,
    check_keys_in_cluster,
    check_model_in_cluster,
    check_port,
)
from serve_app.launch.model_check import check_each, check_model
from serve_app.launch.serve_instance import (
    RunningApplication,
    ask_replicas,
    check_no_conflict,
    check_not_replaced,
    find_application,
    is_running,
    running_serve,
)
from serve_app.launch.shutdown import delete, drain, end_unused_serve
from serve_app.launch.startup import wait_until_answering, wait_until_running
from serve_app.settings import INGRESS, REPLICA, EndpointSettings, ServiceConfig
from serve_app.settings.options import http_options
from serve_app.telemetry.traces import check_extra

_WATCH_S = 1.0
_SERVE_LOST_S = 60.0  # its controller is restarted within seconds
_ANSWER_S = 40.0


class RunningService:
    """A service that answers at `url`."""

    def __init__(self, url: str, applications: list[RunningApplication]) -> None:
        self.url = url
        self._applications = applications

    def watch(self) -> NoReturn:
        """Returns never. Raises ResourceError once one of the service's applications is gone or was replaced."""
        seen = time.monotonic()
        while True:
            time.sleep(_WATCH_S)
            try:
                for application in self._applications:
                    check_not_replaced(application)
                seen = time.monotonic()
            except (RayError, RayServeException, TimeoutError):  # Serve's controller may be on its way back
                if time.monotonic() - seen > _SERVE_LOST_S:
                    raise ResourceError(
                        f"Ray Serve has not answered for {_SERVE_LOST_S:g} s, so this service is lost; check the "
                        "cluster and start it again"
                    ) from None


@contextlib.contextmanager
def running_service(
    config: ServiceConfig,
    ray_address: str | None = None,
    report: Callable[[str], None] = lambda line: None,
    stop_now: Callable[[], bool] = lambda: False,
) -> Iterator[RunningService]:
    """A context in which `config` is served; it is entered once the service answers.

    Starts a local Ray, or joins the cluster at `ray_address`. `report` gets a line for each stage of the start. On
    exit, new requests are refused and running ones may take `graceful_shutdown_timeout_s` seconds more, until
    `stop_now()` is true. Raises a QwenDistError with the root cause if the service cannot start; then nothing is left
    running. In a cluster that was joined, other applications are never touched, and Serve is shut down only if this
    call started it and no other application runs.
    """
    check_extra(config.telemetry.traces_url)
    if ray_address is None:
        check_each(config.models, check_model)
        for model in config.models:
            check_device(model.replica.engine.device)
        check_port(config.endpoint)
        check_files(config)
    # A Ray that is started here inherits this variable.
    os.environ.setdefault(ray_private.PROXY_MIDDLEWARES, proxy.IMPORT_PATH)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    started_ray = ray_cluster.connect(ray_address)
    signal.signal(signal.SIGTERM, on_sigterm)  # undo Ray's handler, which would abort this process
    try:
        existing = running_serve()
        if existing is not None:
            check_no_conflict(config, existing)
        if ray_address is not None:
            check_each(config.models, check_model_in_cluster)
            check_keys_in_cluster(config)
        try:
            targets = applications(config)
            for model in config.models:
                report(
                    f"deploying {model.name} as {model.replica.engine.layout}, {model.scaling.min_replicas} replica(s)"
                )
            if existing is None:
                start_serve(config.endpoint)
            with _deployed(targets, config, started_ray, report, stop_now) as service:
                yield service
        finally:
            if existing is None and not started_ray:
                end_unused_serve()
    finally:
        ray_cluster.shutdown()
        ray_private.forget_serve()


@contextlib.contextmanager
def _deployed(
    targets: Sequence[serve.RunTarget],
    config: ServiceConfig,
    own_ray: bool,
    report: Callable[[str], None],
    stop_now: Callable[[], bool],
) -> Iterator[RunningService]:
    """A context in which the applications are deployed and answer. At its end no request runs and, but in a Ray of our
    own, which ends next, the applications are gone."""
    deployed: list[RunningApplication] = []
    try:
        serve.run_many(targets, wait_for_applications_running=False)
        deployed = [find_application(name) for name in config.applications]
        wait_until_running(config, report)
        url = wait_until_answering(config.endpoint)
        for line in _describe_ranks(config):
            report(line)
        yield RunningService(url, deployed)
    finally:
        if not deployed:  # they were deployed, if at all, a moment ago, when their names were free
            for name in config.applications:
                with contextlib.suppress(ResourceError):
                    deployed.append(find_application(name))
        running = [application for application in deployed if is_running(application)]
        if any(application.name == config.endpoint.name for application in running):
            ingress = serve.get_deployment_handle(INGRESS, config.endpoint.name)
            drain(ingress, config.graceful_shutdown_timeout_s, report, stop_now)
        if not own_ray:
            delete(running, stop_now)


def start_serve(endpoint: EndpointSettings) -> None:
    """Starts the cluster's Serve. Raises ResourceError if it cannot listen there."""
    try:
        serve.start(http_options=http_options(endpoint), logging_config=QUIET_LOGGING)
    except RayError as error:  # a proxy's
        reason = str(error).strip().splitlines()[-1]
        raise ResourceError(
            f"Ray Serve cannot answer on {endpoint.host}:{endpoint.port} ({reason}); if it is taken, choose another "
            "--host or --port"
        ) from None


def _describe_ranks(config: ServiceConfig) -> list[str]:
    """What runs the ranks of the replicas and how they talk to each other, a line for each kind of replica."""
    lines = []
    for model in config.models:
        replicas = serve.get_deployment_handle(REPLICA, config.application(model))
        for replica in ask_replicas(replicas, "ranks", timeout_s=_ANSWER_S):
            lines.append(f"{replica['backends']}; collectives: {replica['collectives']}")
    return list(dict.fromkeys(lines))
