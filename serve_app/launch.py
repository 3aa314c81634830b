"""Brings a service up on Ray, watches until it answers, and takes down what it brought up."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.schema import ApplicationStatus
from ray.util import placement_group_table

from cluster import ray_cluster
from qwen3_dist import errors
from qwen3_dist.config import ModelConfig
from qwen3_dist.engine.engine import check_context
from qwen3_dist.errors import QwenDistError, ResourceError
from qwen3_dist.text.sidecars import read_eos_token_ids, read_generation_defaults
from qwen3_dist.weights.adapters import open_adapters
from qwen3_dist.weights.source import resolve_model
from serve_app.app import APP_NAME, QUIET, bind
from serve_app.config import ServiceConfig

_POLL_S = 0.2
_REPORT_S = 5.0
_ANSWER_TIMEOUT_S = 40.0


@contextlib.contextmanager
def running_service(
    config: ServiceConfig, ray_address: str | None = None, report: Callable[[str], None] = lambda line: None
) -> Iterator[str]:
    """A context in which `config` is served; yields its base URL once it answers.

    Starts a local Ray, or joins the one at `ray_address`. `report` is told how far it is. Raises a
    QwenDistError with the root cause if the service cannot start, and leaves nothing behind.
    """
    check_model(config)
    if ray_address is None:
        check_port(config)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    started_ray = ray_cluster.connect(ray_address)
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own handler would abort this process
    shared_serve = bool(serve.status().proxies)
    try:
        app = bind(config)
        report(f"deploying {config.served_name} as {config.engine.layout}, {config.min_replicas} replica(s)")
        _start_serve(config)
        try:
            target = serve.RunTarget(app, name=APP_NAME, route_prefix="/")
            serve.run_many([target], wait_for_applications_running=False)
            _wait_until_running(config, report)
            url = _wait_until_answering(config)
            for line in _described_ranks(url, config.api_key):
                report(line)
            yield url
        finally:
            with contextlib.suppress(TimeoutError):  # requests still run: the end of Serve or Ray ends them
                serve.delete(APP_NAME)
    finally:
        if not started_ray and not shared_serve:
            serve.shutdown()
        ray_cluster.shutdown()
        # Serve would take the next Ray of this process for this one, since both name their job alike.
        serve.context._set_global_client(None)


def _start_serve(config: ServiceConfig) -> None:
    try:
        serve.start(http_options={"host": config.host, "port": config.port}, logging_config=QUIET)
    except RayError as error:  # a proxy's
        reason = str(error).strip().splitlines()[-1]
        raise ResourceError(
            f"Ray Serve cannot answer on {config.host}:{config.port} ({reason}); if it is taken, choose another "
            "--host or --port"
        ) from None


def check_model(config: ServiceConfig) -> None:
    """Raises CheckpointError, ConfigError or ParallelLayoutError if the model is missing, or if context, layout or
    adapters do not fit it or its files cannot be read."""
    path = resolve_model(config.engine.model, config.engine.revision)
    model_config = ModelConfig.from_directory(path)
    config.engine.layout.validate(model_config)
    check_context(config.engine, model_config)
    read_generation_defaults(path)
    read_eos_token_ids(path)
    open_adapters(config.engine.lora, model_config)


def check_port(config: ServiceConfig) -> None:
    """Raises ResourceError if another process listens on the port, or the host is not this machine's."""
    with socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise ResourceError(
                f"cannot listen on {config.host}:{config.port} ({error.strerror}); choose another --host or --port"
            ) from None


def root_cause(message: str) -> QwenDistError:
    """The error of ours that a Serve status message reports last, traceback and all, or its last line."""
    found = re.findall(r"qwen3_dist\.errors\.(\w+): (.+)", message)
    if found:
        name, sentence = found[-1]
        return getattr(errors, name, QwenDistError)(sentence)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return QwenDistError(f"the service could not start: {lines[-1] if lines else 'Serve gives no reason'}")


def _wait_until_running(config: ServiceConfig, report: Callable[[str], None]) -> None:
    started = reported = time.monotonic()
    last_placed = started
    while True:
        app = serve.status().applications[APP_NAME]
        if app.status == ApplicationStatus.RUNNING:
            return
        deployments = app.deployments
        if app.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            messages = [app.message, *(deployment.message for deployment in deployments.values())]
            raise root_cause("\n".join(messages))
        now = time.monotonic()
        unplaced = _unplaced_bundles()
        if not unplaced:
            last_placed = now
        elif now - last_placed > config.placement_timeout_s:
            raise ResourceError(
                f"no room for {unplaced} within {config.placement_timeout_s:g} s, free is {_free()}; "
                "add nodes, end other jobs or choose a smaller layout"
            )
        if now - reported >= _REPORT_S:
            reported = now
            stage = f"waiting for room for {unplaced}, free is {_free()}" if unplaced else "loading the model"
            report(f"{stage} ({now - started:.0f} s)")
        time.sleep(_POLL_S)


def _unplaced_bundles() -> str:
    """The bundles of a placement group that waits for resources, as text; "" if none does."""
    for group in placement_group_table().values():
        if group["state"] == "PENDING":
            return ", ".join(str(bundle) for bundle in group["bundles"].values())
    return ""


def _free() -> str:
    free = ray.available_resources()
    return ", ".join(f"{free.get(name, 0.0):g} {name}" for name in ("CPU", "GPU"))


def _wait_until_answering(config: ServiceConfig) -> str:
    """The service's base URL, once its /health says 200."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)
    url = f"http://{host}:{config.port}"
    deadline = time.monotonic() + _ANSWER_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=_ANSWER_TIMEOUT_S):
                return url
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            if time.monotonic() > deadline:
                raise ResourceError(
                    f"the service runs but {url} does not answer; if Ray Serve already ran in this cluster, "
                    "use the host and port it was started with"
                ) from None
        time.sleep(_POLL_S)


def _described_ranks(url: str, api_key: str) -> list[str]:
    """What runs the ranks of the replicas and how they talk to each other, a line for each kind of replica."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    request = urllib.request.Request(f"{url}/v1/cluster/ranks", headers=headers)
    with urllib.request.urlopen(request, timeout=_ANSWER_TIMEOUT_S) as answer:
        replicas = json.load(answer)["data"]
    lines = [f"{replica['backends']}; collectives: {replica['collectives']}" for replica in replicas]
    return list(dict.fromkeys(lines))
