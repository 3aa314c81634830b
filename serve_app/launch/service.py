"""Deploys a service on Ray, waits until it answers, and shuts it down."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import NoReturn

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from cluster import ray_cluster, ray_private
from qwen3_dist import errors
from qwen3_dist.config import ModelConfig
from qwen3_dist.engine.engine import check_context
from qwen3_dist.errors import QwenDistError, ResourceError
from qwen3_dist.text.sidecars import read_eos_token_ids, read_generation_defaults
from qwen3_dist.weights.lora_loader import open_adapters
from qwen3_dist.weights.source import resolve_config
from qwen3_dist.worker.cards import local_device
from serve_app.app import INGRESS, QUIET_LOGGING, REPLICA, bind
from serve_app.ingress import proxy
from serve_app.launch.serve_instance import (
    RunningApplication,
    check_no_conflict,
    check_not_replaced,
    find_application,
    is_running,
    running_serve,
    unplaced_bundles,
)
from serve_app.launch.shutdown import delete, drain, end_unused_serve
from serve_app.settings import ServiceConfig

_POLL_S = 0.2
_REPORT_S = 5.0
_ANSWER_TIMEOUT_S = 40.0
_WATCH_S = 1.0
_SERVE_LOST_S = 60.0  # without an answer of Serve's controller, which Ray restarts within seconds


class RunningService:
    """A service that answers at `url`."""

    def __init__(self, url: str, application: RunningApplication) -> None:
        self.url = url
        self._application = application

    def watch(self) -> NoReturn:
        """Blocks. Raises ResourceError once the application is deleted or replaced, or Serve no longer answers."""
        last_answer = time.monotonic()
        while True:
            time.sleep(_WATCH_S)
            try:
                check_not_replaced(self._application)
                last_answer = time.monotonic()
            except (RayError, RayServeException, TimeoutError):  # Serve's controller may be restarting
                if time.monotonic() - last_answer > _SERVE_LOST_S:
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
    check_model(config)
    if ray_address is None:
        local_device(config.engine.device)  # the local Ray has no other GPUs
        check_port(config)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    # A Ray that is started here inherits this variable.
    os.environ.setdefault(ray_private.PROXY_MIDDLEWARES, proxy.IMPORT_PATH)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    started_ray = ray_cluster.connect(ray_address)
    signal.signal(signal.SIGTERM, on_sigterm)  # undo Ray's handler, which would abort this process
    try:
        existing = running_serve()
        if existing is not None:
            check_no_conflict(config, existing)
        try:
            app = bind(config)
            report(
                f"deploying {config.served_name} as {config.engine.layout}, {config.min_replicas} replica(s)"
            )
            if existing is None:
                _start_serve(config)
            with _deployed(app, config, started_ray, report, stop_now) as service:
                yield service
        finally:
            if existing is None and not started_ray:
                end_unused_serve()
    finally:
        ray_cluster.shutdown()
        ray_private.forget_serve()


@contextlib.contextmanager
def _deployed(
    app: serve.Application,
    config: ServiceConfig,
    own_ray: bool,
    report: Callable[[str], None],
    stop_now: Callable[[], bool],
) -> Iterator[RunningService]:
    """A context in which the application is deployed and answers. On exit it is drained, and deleted unless the Ray is
    our own, which the caller shuts down next."""
    target = serve.RunTarget(app, name=config.name, route_prefix=config.route_prefix)
    application: RunningApplication | None = None
    ingress: DeploymentHandle | None = None
    try:
        serve.run_many([target], wait_for_applications_running=False)
        application = find_application(config.name)
        _wait_until_running(config, report)
        url = _wait_until_answering(config)
        for line in _describe_ranks(url, config.api_key):
            report(line)
        ingress = serve.get_deployment_handle(INGRESS, config.name)
        yield RunningService(url, application)
    finally:
        if application is None:  # deploying failed or was interrupted, so it may exist or not
            with contextlib.suppress(ResourceError):
                application = find_application(config.name)
        if application is not None and is_running(application):
            if ingress is not None:
                drain(ingress, config.graceful_shutdown_timeout_s, report, stop_now)
            if not own_ray:
                delete(application, stop_now)


def _start_serve(config: ServiceConfig) -> None:
    try:
        serve.start(http_options={"host": config.host, "port": config.port}, logging_config=QUIET_LOGGING)
    except RayError as error:  # the HTTP proxy could not start
        reason = str(error).strip().splitlines()[-1]
        raise ResourceError(
            f"Ray Serve cannot answer on {config.host}:{config.port} ({reason}); if it is taken, choose another "
            "--host or --port"
        ) from None


def check_model(config: ServiceConfig) -> None:
    """Raises CheckpointError, ConfigError or ParallelLayoutError if the model is missing or unreadable, or does not
    allow the context length, layout or adapters of `config`."""
    path = resolve_config(config.engine.model, config.engine.revision)
    model_config = ModelConfig.from_directory(path)
    config.engine.layout.validate(model_config)
    check_context(config.engine, model_config)
    read_generation_defaults(path)
    read_eos_token_ids(path)
    open_adapters(config.engine.lora, model_config)


def check_port(config: ServiceConfig) -> None:
    """Raises ResourceError if the port is in use, or the host is not an address of this machine."""
    with socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise ResourceError(
                f"cannot listen on {config.host}:{config.port} ({error.strerror}); choose another --host or --port"
            ) from None


def root_cause(message: str) -> QwenDistError:
    """The last QwenDistError in a status message of Serve, which holds tracebacks; else an error with its last
    line."""
    found = re.findall(r"qwen3_dist\.errors\.(\w+): (.+)", message)
    if found:
        name, sentence = found[-1]
        return getattr(errors, name, QwenDistError)(sentence)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return QwenDistError(
        f"the service could not start: {lines[-1] if lines else 'Ray Serve gives no reason'}"
    )


def _wait_until_running(config: ServiceConfig, report: Callable[[str], None]) -> None:
    """Waits until all replicas run. Raises ResourceError or the root cause of a failed start."""
    started = reported = time.monotonic()
    last_placed = started
    while True:
        app = serve.status().applications.get(config.name)
        if app is None:
            raise ResourceError(f"application {config.name!r} was deleted while it started; start it again")
        if app.status == ApplicationStatus.RUNNING:
            return
        deployments = app.deployments
        if app.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            messages = [app.message, *(deployment.message for deployment in deployments.values())]
            raise root_cause("\n".join(messages))
        now = time.monotonic()
        unplaced = unplaced_bundles(config.name, REPLICA)
        if not unplaced:
            last_placed = now
        elif now - last_placed > config.placement_timeout_s:
            raise ResourceError(
                f"no room for {unplaced} within {config.placement_timeout_s:g} s, only {_free()} is free; "
                "add nodes, end other jobs or choose a smaller layout"
            )
        if now - reported >= _REPORT_S:
            reported = now
            stage = f"waiting for room for {unplaced}, {_free()} is free" if unplaced else "loading the model"
            report(f"{stage} ({now - started:.0f} s)")
        time.sleep(_POLL_S)


def _free() -> str:
    free = ray.available_resources()
    return ", ".join(f"{free.get(name, 0.0):g} {name}" for name in ("CPU", "GPU"))


def _wait_until_answering(config: ServiceConfig) -> str:
    """Waits until /health answers 200. Returns the base URL. Raises ResourceError on a timeout."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)
    url = f"http://{host}:{config.port}{config.route_prefix.rstrip('/')}"
    deadline = time.monotonic() + _ANSWER_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=_ANSWER_TIMEOUT_S):
                return url
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            if time.monotonic() > deadline:
                raise ResourceError(
                    f"the service runs but {url} does not answer; see Ray Serve's log on the head node"
                ) from None
        time.sleep(_POLL_S)


def _describe_ranks(url: str, api_key: str) -> list[str]:
    """The backends and collectives of the replicas, one line for each distinct combination."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    request = urllib.request.Request(f"{url}/v1/cluster/ranks", headers=headers)
    with urllib.request.urlopen(request, timeout=_ANSWER_TIMEOUT_S) as answer:
        replicas = json.load(answer)["data"]
    lines = [f"{replica['backends']}; collectives: {replica['collectives']}" for replica in replicas]
    return list(dict.fromkeys(lines))
