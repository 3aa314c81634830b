"""Changes of a running service that admins ask for: how many replicas a model has, and the layout of each.

It changes what was deployed, so it lasts until the next `deploy`, which brings back what its file says.
"""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any

from qwen3_dist.errors import ParallelLayoutError, RequestError, ResourceError
from qwen3_dist.layout import Layout, layout_sizes
from serve_app.apis.shared.body import Body, Json, Range, about, read_admin_body
from serve_app.deployed import Config, apply_configs, deployed_configs
from serve_app.placement import place, surge_percent
from serve_app.settings import INGRESS, REPLICA
from serve_app.settings.service import read_model_settings

_Model = Annotated[str, about("Name of the served model; optional if there is one.")]
_LEAST_CPUS = 0.01  # of a rank
_NUMBERS = ("min_replicas", "max_replicas")
_Replicas = Annotated[int, Range(1, 10_000)]


class ScaleBody(Body):
    """A body of /v1/cluster/scale."""

    model: _Model = ""
    min_replicas: Annotated[int, Range(0, 10_000), about("Engines that always run.")] | None = None
    max_replicas: (
        Annotated[_Replicas, about("Most engines that load may start; min_replicas by default.")] | None
    ) = None
    layout: Annotated[str, about("How each engine's ranks split the model, as dp=2,ep=2.")] | None = None


@dataclass(frozen=True)
class Scale:
    """How many replicas a model has, and their layout, which may not fit; None stays as it is."""

    model: str
    replicas: tuple[int, int] | None
    layout: str | None = None


def parse_scale(body: bytes) -> Scale:
    """Raises RequestError."""
    read = read_admin_body(ScaleBody, body)
    layout = read.layout
    if layout is not None:
        _check_sizes(layout)
    if read.min_replicas is None:
        if layout is None or read.max_replicas is not None:
            raise RequestError("min_replicas is required, or layout alone", param="min_replicas")
        return Scale(read.model, None, layout)
    most = max(1, read.min_replicas) if read.max_replicas is None else read.max_replicas
    if most < read.min_replicas:
        raise RequestError(
            f"max_replicas={most} must not be less than min_replicas={read.min_replicas}",
            param="max_replicas",
        )
    return Scale(read.model, (read.min_replicas, most), layout)


def _check_sizes(layout: str) -> None:
    try:
        layout_sizes(layout)
    except ParallelLayoutError as error:
        raise RequestError(str(error), param="layout") from None


def scale(gateway: str, application: str, name: str, to: Scale) -> Json:
    """Gives the model `name`, whose replicas are in `application`, other numbers of replicas or another layout, with
    which its replicas start anew one after the other. Blocks for Serve's controller. Raises RequestError."""
    configs = configs_of(gateway, application)
    changed: Json = {}
    if to.replicas is not None:
        changed = dict(zip(_NUMBERS, to.replicas, strict=True))
        deployment_of(configs[application], REPLICA)["autoscaling_config"] |= changed
        for model in deployment_of(configs[gateway], INGRESS)["user_config"]["models"]:
            if model["name"] == name:
                model |= changed
    if to.layout is not None:
        layout = Layout.parse(to.layout)
        changed["layout"] = str(layout)
        configs[application]["args"] = _with_layout(configs[application], layout)
    apply_configs(configs.values())
    return {"object": "cluster.scale", "model": name, **changed}


def _with_layout(application: Config, layout: Layout) -> Json:
    """The arguments of a model's application with another layout; CPU ranks share the same cores as before. Raises
    RequestError if the cluster cannot hold it."""
    deployment = deployment_of(application, REPLICA)
    scaling = {name: deployment["autoscaling_config"][name] for name in _NUMBERS}
    args = application["args"]
    before = read_model_settings(args).replica.engine
    more = layout.world / before.layout.world
    args |= {"layout": str(layout)}
    if before.cpus_per_rank is not None:
        args["cpus_per_rank"] = max(_LEAST_CPUS, round(before.cpus_per_rank / more, 2))
    if before.ranks_per_host is not None:
        args["ranks_per_host"] = max(1, round(before.ranks_per_host * more))
    model = read_model_settings({**args, **scaling})
    try:
        placement = place(model)
    except ResourceError as error:
        raise RequestError(f"layout={layout} does not fit: {error}", param="layout") from None
    if placement.engine.device != "cpu":
        deployment["max_surge_percent"] = surge_percent(model, placement)
    return args


def configs_of(*applications: str) -> dict[str, Config]:
    """The configs of all applications. Raises RequestError (409) if these are not deployed by config."""
    configs = deployed_configs()
    if not configs.keys() >= set(applications):
        raise RequestError(
            "this service was started by `qwen3-dist serve` and does not change as it runs; use `qwen3-dist deploy`",
            status=HTTPStatus.CONFLICT,
        )
    return configs


def deployment_of(application: Config, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(each for each in application["deployments"] if each["name"] == name)
    return found
