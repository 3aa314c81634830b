"""What `/v1/cluster` tells: every ingress, model, replica and rank of a service as one JSON object."""

from __future__ import annotations

import asyncio
import contextlib
from importlib.metadata import version
from typing import Any, NamedTuple

from ray.exceptions import RayError
from ray.serve.exceptions import DeploymentUnavailableError

from qwen3_dist import __version__
from serve_app.apis.shared.answer import Json
from serve_app.ingress.model_routes import ModelRoute, ModelRoutes
from serve_app.ingress.peers import Peers, values
from serve_app.settings import REPLICA
from serve_app.waiting import unplaced_bundles

_ANSWER_TIMEOUT_S = 5.0


class IngressState(NamedTuple):
    """What one ingress tells of itself: sequences in flight, the most it takes, the seconds since its start, and the
    model of the reload that it leads."""

    ingress: str
    in_flight: int
    limit: int
    uptime_s: float
    reloading: str = ""


async def cluster_view(routes: ModelRoutes, own: IngressState, peers: Peers) -> Json:
    """Asks all replicas and the other ingresses at once; one that does not answer in five seconds is listed with the
    reason.

    `own` is the state of the ingress that asks.
    """
    told, *models = await asyncio.gather(
        peers.ask("state", timeout_s=_ANSWER_TIMEOUT_S), *map(_model_view, routes)
    )
    states: list[IngressState] = [own, *values(told)]
    for model in models:
        model["reloading"] = any(model["id"] == state.reloading for state in states)
    return {
        "object": "cluster",
        "version": __version__,
        "ray_version": version("ray"),
        "uptime_s": max(state.uptime_s for state in states),
        "models": models,
        "ingress": {
            "in_flight": sum(state.in_flight for state in states),
            "limit": sum(state.limit for state in states),
            "replicas": [
                *(_ingress_view(state) for state in states),
                *(_lost_view(each) for each in told if isinstance(each, BaseException)),
            ],
        },
    }


def _ingress_view(state: IngressState) -> Json:
    return {
        "id": state.ingress,
        "healthy": True,
        "message": "",
        "in_flight": state.in_flight,
        "limit": state.limit,
        "uptime_s": state.uptime_s,
    }


def _lost_view(error: BaseException) -> Json:
    message = str(error) or type(error).__name__
    if isinstance(error, DeploymentUnavailableError):  # its text is the deployment's name alone
        message = "no replica runs; `qwen3-dist status` shows what the next one waits for"
    return {"id": None, "healthy": False, "message": message}


async def _model_view(route: ModelRoute) -> Json:
    answers, waits_for = await asyncio.gather(
        route.ask_each("describe", _ANSWER_TIMEOUT_S), _waits_for(route.replicas.app_name)
    )
    replicas = [_replica_view(answer) for answer in answers]
    problems = [replica["message"] for replica in replicas if replica["message"]]
    if waits_for:
        problems.append(f"a replica waits for room for {waits_for}")
    return {
        "id": route.model.name,
        "adapters": list(route.model.adapters),
        "application": route.model.application,
        "status": route.state,
        "message": "; ".join(problems),
        "waits_for": waits_for,
        "replicas_running": sum(replica["healthy"] for replica in replicas),
        "min_replicas": route.model.min_replicas,
        "max_replicas": route.model.max_replicas,
        "replicas": replicas,
    }


async def _waits_for(application: str) -> str:
    """What a replica waits for room for; "" also while Ray's head does not answer, since the service goes on then."""
    asking = asyncio.to_thread(unplaced_bundles, application, REPLICA)
    with contextlib.suppress(TimeoutError, RayError):
        return await asyncio.wait_for(asking, _ANSWER_TIMEOUT_S)
    return ""


def _replica_view(answer: Any) -> Json:
    if isinstance(answer, BaseException):
        return {**_lost_view(answer), "ranks": []}
    view: Json = answer
    return view
