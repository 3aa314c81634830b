"""Deploys services on a running Ray cluster, where they stay after the command ends; changes and stops them there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ray import serve

from cluster import ray_private
from qwen3_dist.errors import ResourceError
from qwen3_dist.settings import EngineConfig
from serve_app.deployed import Config, apply_configs, deployed_configs
from serve_app.launch.checks import check_keys_in_cluster, check_model_in_cluster
from serve_app.launch.foreground import start_serve
from serve_app.launch.model_check import check_each
from serve_app.launch.schema import serve_schema
from serve_app.launch.serve_instance import (
    find_application,
    is_running,
    require_address,
    require_route,
    running_serve,
)
from serve_app.launch.shutdown import delete, drain, end_unused_serve
from serve_app.launch.startup import has_failed, wait_until_answering, wait_until_running
from serve_app.placement import place, surge_percent
from serve_app.settings import INGRESS, ModelSettings, ServiceConfig
from serve_app.telemetry.traces import check_extra

_DRAIN_S = 600.0
_CORE_SHARES = ("cpus_per_rank", "ranks_per_host")


@dataclass(frozen=True)
class Change:
    """What deploying changes in one application of Serve."""

    application: str
    kind: str  # "new", "reloaded", "updated", "unchanged", "failed" or "removed"
    settings: tuple[str, ...] = ()  # the changed arguments that cause a reload


def deploy(config: ServiceConfig, report: Callable[[str], None], wait: bool = True) -> str:
    """Deploys `config`, or changes the service of its name to it; returns its URL, once it answers if `wait`.

    Replicas of a model restart only if the settings they are built with changed; they take changed limits, keys and
    scaling as they run. Other applications of the cluster's Serve stay as they are. Raises a QwenDistError if a model,
    the keys file or the cluster's Serve does not fit, or with the root cause if the service cannot start.
    """
    check_extra(config.telemetry.traces_url)
    instance = running_serve()
    if instance is not None:
        require_address(config, instance)
        require_route(config, instance)
    check_each(config.models, check_model_in_cluster)
    check_keys_in_cluster(config)
    if instance is None:
        start_serve(config.endpoint)
    deployed, failed = deployed_configs(), failed_applications()
    schema = serve_schema(config)
    for model, app in zip(config.models, schema["applications"][1:], strict=True):
        before = deployed.get(app["name"], {})
        placement = place(model, config.models)
        app["args"] |= _shares_of_cores(model, placement.engine, app["args"], before.get("args", {}))
        if before:
            _set_surge(app, before, surge_percent(model, placement))
    changed = changes(schema, deployed, config.endpoint.name, failed)
    for change in changed:
        report(describe(change))
    # Serve would do nothing for them: it compares settings and not how the application is.
    again = [find_application(change.application) for change in changed if change.kind == "failed"]
    delete(again, stop_now=lambda: False)
    names = set(config.applications)
    others = [
        app for name, app in deployed.items() if name not in names and not _is_of(name, config.endpoint.name)
    ]
    schema["applications"] += others
    apply_configs(**schema)
    if wait:
        wait_until_running(config, report)
        return wait_until_answering(config.endpoint)
    return ""


def failed_applications() -> set[str]:
    """The applications that do not run and that Serve does not mend."""
    return {name for name, status in serve.status().applications.items() if has_failed(status)}


def changes(
    schema: Mapping[str, Any],
    deployed: Mapping[str, Mapping[str, Any]],
    service: str,
    failed: Collection[str] = (),
) -> list[Change]:
    """What applying `schema` changes in the applications of a service, in the order of the schema. Of those that have
    `failed`, Serve itself starts only those anew whose arguments changed."""
    found = []
    for app in schema["applications"]:
        before = deployed.get(app["name"])
        if before is None:
            found.append(Change(app["name"], "new"))
            continue
        args, earlier = app.get("args", {}), before.get("args", {})
        differing = tuple(sorted(n for n in {*args, *earlier} if args.get(n) != earlier.get(n)))
        if differing:
            found.append(Change(app["name"], "reloaded", differing))
        elif app["name"] in failed:
            found.append(Change(app["name"], "failed"))
        else:
            same = _options(app) == _options(before) and app["route_prefix"] == before.get("route_prefix")
            found.append(Change(app["name"], "unchanged" if same else "updated"))
    names = {app["name"] for app in schema["applications"]}
    gone = [name for name in deployed if _is_of(name, service) and name not in names]
    return [*found, *(Change(name, "removed") for name in gone)]


def describe(change: Change) -> str:
    """One change as a sentence."""
    return {
        "new": f"{change.application}: starts",
        "reloaded": f"{change.application}: loads its model again, for a changed {', '.join(change.settings)}",
        "updated": f"{change.application}: takes its changed settings as it runs",
        "unchanged": f"{change.application}: stays as it is",
        "failed": f"{change.application}: has failed, so it ends and starts again",
        "removed": f"{change.application}: ends",
    }[change.kind]


def stop(
    name: str, report: Callable[[str], None], stop_now: Callable[[], bool], timeout_s: float = _DRAIN_S
) -> None:
    """Ends the service called `name`: refuses new requests, waits `timeout_s` for the running ones, removes it.

    Raises ResourceError if the cluster has no such service. Ends Serve too if nothing else runs in it.
    """
    service, is_model, _ = name.partition("--")
    if is_model:
        raise ResourceError(
            f"{name} is a model of the service {service}; remove it from the service's file and deploy that"
        )
    instance = running_serve()
    found = [app for app in (instance.applications if instance else {}) if app == name or _is_of(app, name)]
    if not found:
        running = (
            ", ".join(sorted(app for app in instance.applications if "--" not in app)) if instance else ""
        )
        raise ResourceError(
            f"this Ray cluster has no service called {name!r}; "
            + (f"it has {running}" if running else "nothing is deployed in it")
        )
    applications = [find_application(app) for app in found]
    if name in found:
        drain(ray_private.deployment_handle(INGRESS, name), timeout_s, report, stop_now)
    delete(applications, stop_now)
    if left := [application.name for application in applications if is_running(application)]:
        report(f"Ray Serve still ends {', '.join(left)}; `qwen3-dist status` shows when it is done")
    end_unused_serve()


def _set_surge(app: Config, before: Config, percent: int) -> None:
    """Sets how many new replicas start before old ones end, if `app` is loaded again; else it stays as it was."""
    [deployment], [earlier] = app["deployments"], before["deployments"]
    if app["args"] == before["args"]:
        percent = earlier.get("max_surge_percent", percent)
    deployment["max_surge_percent"] = percent


def _shares_of_cores(
    model: ModelSettings, engine: EngineConfig, args: Mapping[str, Any], deployed: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings by which a model's CPU ranks share cores, as far as the user leaves them unset; none on GPUs.

    They depend on the numbers of replicas and of other models. A model whose other `args` are those `deployed` keeps
    its share, since another one would load the model again.
    """
    if engine.device != "cpu":
        return {}
    unset = [name for name in _CORE_SHARES if getattr(model.replica.engine, name) is None]
    stays = args == {name: value for name, value in deployed.items() if name not in unset}
    return {name: (stays and deployed.get(name)) or getattr(engine, name) for name in unset}


def _is_of(application: str, service: str) -> bool:
    """Whether an application holds a model of a service."""
    return application.startswith(f"{service}--")


def _options(app: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an application's deployments by name, as far as they are set."""
    return {
        deployment["name"]: {name: value for name, value in deployment.items() if name != "name"}
        for deployment in app.get("deployments", [])
    }
