"""What `/v1/cluster` tells: every model, replica and rank of a service as one JSON object."""

from __future__ import annotations

import asyncio
import time
from importlib.metadata import version
from typing import Any

from qwen3_dist import __version__
from serve_app.apis.shared.answer import Json
from serve_app.ingress.model_routes import ModelRoute, ModelRoutes

_ANSWER_TIMEOUT_S = 5.0


async def cluster_view(routes: ModelRoutes, in_flight: int, limit: int, created: int) -> Json:
    """Asks all replicas at once; one that does not answer in five seconds is listed with the reason.

    `in_flight` and `limit` are sequences of the ingress that asks; `created` is its start in Unix seconds.
    """
    models = await asyncio.gather(*map(_model_view, routes))
    return {
        "object": "cluster",
        "version": __version__,
        "ray_version": version("ray"),
        "uptime_s": time.time() - created,
        "models": list(models),
        "ingress": {"in_flight": in_flight, "limit": limit},
    }


async def _model_view(route: ModelRoute) -> Json:
    answers = await route.ask_each("describe", _ANSWER_TIMEOUT_S)
    replicas = [_replica_view(answer) for answer in answers]
    problems = [replica["message"] for replica in replicas if replica["message"]]
    return {
        "id": route.model.name,
        "adapters": list(route.model.adapters),
        "application": route.model.application,
        "status": route.state,
        "message": "; ".join(problems),
        "replicas_running": sum(replica["healthy"] for replica in replicas),
        "min_replicas": route.model.min_replicas,
        "max_replicas": route.model.max_replicas,
        "replicas": replicas,
    }


def _replica_view(answer: Any) -> Json:
    if isinstance(answer, BaseException):
        return {"id": None, "healthy": False, "message": str(answer) or type(answer).__name__, "ranks": []}
    view: Json = answer
    return view
