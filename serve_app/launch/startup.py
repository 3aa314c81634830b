"""Waits until a deployed service answers, or says why it does not."""

from __future__ import annotations

import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from ray import serve
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from qwen3_dist import errors
from qwen3_dist.errors import QwenDistError, ResourceError
from serve_app.settings import REPLICA, EndpointSettings, ServiceConfig
from serve_app.waiting import unplaced_bundles

_POLL_S = 0.2
_REPORT_S = 5.0
_ANSWER_TIMEOUT_S = 40.0
_COMES_UP = ("RUNNING", "STARTING", "UPDATING", "RECOVERING", "PENDING_MIGRATION")  # states of replicas
_START_FAILED = "REPLICA_STARTUP_FAILED"  # every start since the last replica ran


def has_failed(status: ApplicationStatusOverview) -> bool:
    """Whether an application does not run and Serve does not mend it.

    Serve calls an application UNHEALTHY also while it starts a replica in place of one that was lost. That one has not
    failed, unless every start fails.
    """
    if status.status == ApplicationStatus.DEPLOY_FAILED:
        return True
    if status.status != ApplicationStatus.UNHEALTHY:
        return False
    return any(
        deployment.status_trigger == _START_FAILED
        for deployment in status.deployments.values()
        if deployment.status == "UNHEALTHY"
    ) or not any(
        count and state in _COMES_UP
        for deployment in status.deployments.values()
        for state, count in deployment.replica_states.items()
    )


def wait_until_running(config: ServiceConfig, report: Callable[[str], None]) -> None:
    """Waits until Serve runs all applications of a service. Raises the root cause of one that fails, ResourceError if
    a model finds no room in the time it has."""
    started = reported = time.monotonic()
    last_placed = {model.name: started for model in config.models}
    while True:
        statuses = serve.status().applications
        for name in config.applications:
            if name not in statuses:
                raise ResourceError(f"application {name!r} was deleted while it started; start it again")
            if has_failed(statuses[name]):
                deployments = statuses[name].deployments.values()
                messages = [statuses[name].message, *(deployment.message for deployment in deployments)]
                raise root_cause("\n".join(messages))
        if all(statuses[name].status == ApplicationStatus.RUNNING for name in config.applications):
            return
        now = time.monotonic()
        stage = "loading the model"
        for model in config.models:
            unplaced = unplaced_bundles(config.application(model), REPLICA)
            if not unplaced:
                last_placed[model.name] = now
                continue
            stage = f"waiting for room for {unplaced}"
            if now - last_placed[model.name] > model.scaling.placement_timeout_s:
                raise ResourceError(
                    f"no room within {model.scaling.placement_timeout_s:g} s for {unplaced}; "
                    "add nodes, end other jobs or choose a smaller layout"
                )
        if now - reported >= _REPORT_S:
            reported = now
            report(f"{stage} ({now - started:.0f} s)")
        time.sleep(_POLL_S)


def base_url(endpoint: EndpointSettings) -> str:
    """The URL at which this machine reaches the service."""
    scheme = "https" if endpoint.ssl_certfile else "http"
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(endpoint.host, endpoint.host)
    return f"{scheme}://{host}:{endpoint.port}{endpoint.route_prefix.rstrip('/')}"


def own_tls(endpoint: EndpointSettings) -> ssl.SSLContext | None:
    """TLS for a client on this machine: it trusts the service's certificate, whatever host that is for.

    A certificate that is on other machines only cannot be checked: then nothing secret should be sent. None without
    TLS.
    """
    if not endpoint.ssl_certfile:
        return None
    context = ssl.create_default_context()
    context.check_hostname = False
    try:
        context.load_verify_locations(endpoint.ssl_certfile)
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    except OSError:
        context.verify_mode = ssl.CERT_NONE
    return context


def wait_until_answering(endpoint: EndpointSettings) -> str:
    """The service's base URL, once its /ready says 200."""
    url = base_url(endpoint)
    tls = own_tls(endpoint)
    deadline = time.monotonic() + _ANSWER_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=_ANSWER_TIMEOUT_S, context=tls):
                return url
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            if time.monotonic() > deadline:
                raise ResourceError(
                    f"the service runs but {url} does not answer; see Ray Serve's log on the head node"
                ) from None
        time.sleep(_POLL_S)


def root_cause(message: str) -> QwenDistError:
    """The error of ours that a Serve status message reports last, traceback and all, or its last line."""
    found = re.findall(r"qwen3_dist\.errors\.(\w+): (.+)", message)
    if found:
        name, sentence = found[-1]
        return getattr(errors, name, QwenDistError)(sentence)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return QwenDistError(
        f"the service could not start: {lines[-1] if lines else 'Ray Serve gives no reason'}"
    )
