"""Changes of a running service that admins ask for: how many replicas a model has.

It changes what was deployed, so it lasts until the next `deploy`, which brings back what its file says.
"""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any

from qwen3_dist.errors import RequestError
from serve_app.apis.shared.body import Body, Json, Range, about, read_body
from serve_app.deployed import Config, apply_configs, deployed_configs
from serve_app.settings import INGRESS, REPLICA

_Model = Annotated[str, about("Name of the served model; optional if there is one.")]
_Replicas = Annotated[int, Range(1, 10_000)]


class ScaleBody(Body):
    """A body of /v1/cluster/scale."""

    model: _Model = ""
    min_replicas: Annotated[int, Range(0, 10_000), about("Engines that always run.")]
    max_replicas: (
        Annotated[_Replicas, about("Most engines that load may start; min_replicas by default.")] | None
    ) = None


@dataclass(frozen=True)
class Scale:
    """How many replicas a model has."""

    model: str
    min_replicas: int
    max_replicas: int


def parse_scale(body: bytes) -> Scale:
    """Raises RequestError."""
    read = read_body(ScaleBody, body)
    most = max(1, read.min_replicas) if read.max_replicas is None else read.max_replicas
    if most < read.min_replicas:
        raise RequestError(
            f"max_replicas={most} must not be less than min_replicas={read.min_replicas}",
            param="max_replicas",
        )
    return Scale(read.model, read.min_replicas, most)


def scale(gateway: str, application: str, name: str, to: Scale) -> Json:
    """Gives the model `name`, whose replicas are in `application`, other numbers of replicas. Blocks for Serve's
    controller. Raises RequestError."""
    configs = _configs(gateway, application)
    numbers = {"min_replicas": to.min_replicas, "max_replicas": to.max_replicas}
    _deployment(configs[application], REPLICA)["autoscaling_config"] |= numbers
    for model in _deployment(configs[gateway], INGRESS)["user_config"]["models"]:
        if model["name"] == name:
            model |= numbers
    apply_configs(configs.values())
    return {"object": "cluster.scale", "model": name, **numbers}


def _configs(*applications: str) -> dict[str, Config]:
    configs = deployed_configs()
    if not configs.keys() >= set(applications):
        raise RequestError(
            "this service was started by `qwen3-dist serve` and does not change as it runs; use `qwen3-dist deploy`",
            status=HTTPStatus.CONFLICT,
        )
    return configs


def _deployment(application: Config, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(each for each in application["deployments"] if each["name"] == name)
    return found
