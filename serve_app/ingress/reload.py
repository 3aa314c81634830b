"""Loads a model's engine anew while it serves: one replica after the other leaves, and Ray Serve starts another.

What was deployed stays as it is, so a later `deploy` keeps the new replicas. Requests of a replica that leaves go on
at another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import math
import time
from http import HTTPStatus
from typing import Annotated

from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentStatus, DeploymentStatusOverview

from cluster.ray_private import broadcast, running_replicas
from qwen3_dist.errors import RequestError
from serve_app.apis.shared.answer import Json
from serve_app.apis.shared.body import Body, about, read_admin_body
from serve_app.ingress.model_routes import ModelRoute
from serve_app.ingress.peers import Peers, values

logger = logging.getLogger("qwen3_dist.reload")
LEAVE = "leave"  # the method of replicas
_OFFER = "reloading"
_ANSWER_TIMEOUT_S = 5.0
_POLL_S = 0.2
_SETTLED_S = 2.0  # Serve may call a deployment healthy until it has begun to replace what it lost


class ReloadBody(Body):
    """A body of /v1/cluster/reload."""

    model: Annotated[str, about("Name of the served model; optional if there is one.")] = ""


def parse_reload(body: bytes) -> str:
    """The name of the model; empty for the only one. Raises RequestError."""
    return read_admin_body(ReloadBody, body).model


class Reload:
    """The reload that one ingress leads, if any. A service has one at a time. Used on the process's event loop."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self.model = ""  # whose replicas leave now
        self._task: asyncio.Task[None] | None = None
        peers.offer(_OFFER, lambda: self.model)

    async def begin(self, route: ModelRoute) -> Json:
        """Begins to reload a model, and answers with the replicas that will leave. Raises RequestError (409) while
        this ingress or another one leads a reload, and while a deployment of the model renews its replicas."""
        self._refuse_while(self.model)
        self.model = route.model.name  # before others are asked: of two ingresses at once, one sees the other
        try:
            others = values(await self._peers.ask(_OFFER, timeout_s=_ANSWER_TIMEOUT_S))
            self._refuse_while(next(filter(None, others), ""))
            await asyncio.to_thread(_refuse_while_updating, route)
            replicas = running_replicas(route.replicas)
        except BaseException:
            self.model = ""
            raise
        # Without the context of the request: when its client leaves, Serve cancels what the request has called.
        self._task = asyncio.create_task(self._run(route, replicas), context=contextvars.Context())
        return {"object": "cluster.reload", "model": route.model.name, "replicas": list(replicas)}

    @staticmethod
    def _refuse_while(model: str) -> None:
        if model:
            raise RequestError(
                f"the replicas of {model!r} are being reloaded; ask again when /v1/cluster no longer says so",
                status=HTTPStatus.CONFLICT,
            )

    async def _run(self, route: ModelRoute, replicas: tuple[str, ...]) -> None:
        logger.info("model %r is reloaded: %d replica(s)", route.model.name, len(replicas))
        try:
            for replica in replicas:
                await _renew(route.replicas, replica)
            logger.info("model %r was reloaded", route.model.name)
        except Exception:
            logger.exception("model %r was not reloaded on all replicas", route.model.name)
        finally:
            self.model = ""


async def _renew(replicas: DeploymentHandle, leaving: str) -> None:
    """Has a replica leave, and waits until there are as many as before, or as many as Serve wants now."""
    before = len(running_replicas(replicas))
    while leaving in running_replicas(replicas):  # until Serve has noticed
        with contextlib.suppress(Exception):  # it is asked again
            await broadcast(replicas, LEAVE, leaving, timeout_s=_ANSWER_TIMEOUT_S)
        await asyncio.sleep(_POLL_S)
    had_all_since = math.inf
    while len(running_replicas(replicas)) < before and time.monotonic() - had_all_since < _SETTLED_S:
        has = await asyncio.to_thread(has_all, replicas)
        had_all_since = min(had_all_since, time.monotonic()) if has else math.inf
        await asyncio.sleep(_POLL_S)


def _refuse_while_updating(route: ModelRoute) -> None:
    """Raises RequestError (409) while Serve gives replicas other settings: with the old ones gone as well no replica
    would be left. Blocks for Serve's controller."""
    status = _status(route.replicas)
    if status is not None and status.status == DeploymentStatus.UPDATING:
        raise RequestError(
            f"a deployment of {route.model.name!r} still renews its replicas; ask again when it has ended",
            status=HTTPStatus.CONFLICT,
        )


def has_all(replicas: DeploymentHandle) -> bool:
    """Whether Serve runs as many replicas as it wants, as far as it knows. Blocks for its controller."""
    deployment = _status(replicas)
    if deployment is None:
        return True
    states = {state for state, count in deployment.replica_states.items() if count}
    return deployment.status == DeploymentStatus.HEALTHY and states <= {"RUNNING", "STOPPING"}


def _status(replicas: DeploymentHandle) -> DeploymentStatusOverview | None:
    """What Serve's controller says of the deployment."""
    application = serve.status().applications.get(replicas.app_name)
    return application.deployments.get(replicas.deployment_name) if application else None
