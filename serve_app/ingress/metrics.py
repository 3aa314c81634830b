"""An ingress's metrics: what it counts of HTTP itself, and the page that adds those of all replicas."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from fastapi import Request
from ray import serve
from starlette.types import Message, Send

from serve_app.ingress.access_log import CLIENT_LEFT
from serve_app.ingress.admission import REFUSE_FOR_HEADER
from serve_app.ingress.http import Meter, route_path
from serve_app.ingress.model_routes import ModelRoute
from serve_app.metrics import definitions as names
from serve_app.metrics.exposition import render
from serve_app.metrics.ray_export import RayPush
from serve_app.metrics.values import Snapshot, Values

logger = logging.getLogger("ray.serve")
ANSWER_TIMEOUT_S = 3.0  # of a replica or an ingress; Prometheus gives a scrape 10 s by default
_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
_OVERLOADED = REFUSE_FOR_HEADER.encode()
_REASONS: dict[int, str] = {
    HTTPStatus.UNAUTHORIZED: "key",
    HTTPStatus.FORBIDDEN: "key",
    HTTPStatus.REQUEST_TIMEOUT: "timeout",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "too_large",
    HTTPStatus.TOO_MANY_REQUESTS: "key_limit",
    HTTPStatus.SERVICE_UNAVAILABLE: "unavailable",
}


class IngressMetrics:
    """Counts HTTP requests, and answers scrapes.

    `ask` returns the snapshot of each replica and of each other ingress, or an exception for one that did not answer
    within so many seconds.
    `read_state` sets what is counted elsewhere in the values it is given, just before they are read.
    """

    def __init__(
        self,
        ask: Callable[[float], Awaitable[Sequence[Snapshot | BaseException]]],
        read_state: Callable[[Values], None],
        ingress: str,
    ) -> None:
        self._ask, self._read_state = ask, read_state
        self._labels = {"ingress": ingress}
        self.values = values = Values()
        for definition in (names.HTTP_IN_FLIGHT, names.HTTP_STREAMS, names.REPLICAS_SILENT):
            values.set(definition, 0.0)
        for reason in _REASONS.values():
            values.set(names.HTTP_REFUSED, 0.0, reason)

    def push_to_ray(self) -> RayPush:
        """Begins to pass the ingress's own metrics on to Ray."""

        async def read() -> Snapshot:
            return self.read()

        return RayPush(read)

    async def page(self) -> bytes:
        """All metrics of this ingress, and of the others and the replicas that answer, in Prometheus's text format."""
        answers = await self._ask(ANSWER_TIMEOUT_S)
        silent = [each for each in answers if isinstance(each, BaseException)]
        if silent:
            self.values.add(names.REPLICAS_SILENT, len(silent))
            logger.warning(
                "%d replica(s) or ingress(es) did not tell their metrics: %r", len(silent), silent[0]
            )
        told = [each for each in answers if isinstance(each, Snapshot)]
        return await asyncio.to_thread(render, [self.read(), *told])

    @contextmanager
    def request(self, request: Request, send: Send) -> Iterator[Send]:
        """A context in which a request is answered through the `send` that it gives."""
        values = self.values
        status, streams, reason = CLIENT_LEFT, False, ""

        async def observed(message: Message) -> None:
            nonlocal status, streams, reason
            if message["type"] == "http.response.start":
                headers = dict(message.get("headers", ()))
                status = int(message["status"])
                streams = headers.get(b"content-type", b"").startswith(b"text/event-stream")
                reason = "overloaded" if _OVERLOADED in headers else _REASONS.get(status, "")
                values.add(names.HTTP_STREAMS, float(streams))
            await send(message)

        values.add(names.HTTP_IN_FLIGHT, 1.0)
        try:
            yield observed
        finally:
            values.add(names.HTTP_IN_FLIGHT, -1.0)
            values.add(names.HTTP_STREAMS, -float(streams))
            method = request.method if request.method in _METHODS else "other"
            values.add(names.HTTP_REQUESTS, 1.0, _route(request), method, str(status))
            if reason:
                values.add(names.HTTP_REFUSED, 1.0, reason)

    def read(self) -> Snapshot:
        """The metrics of this ingress now."""
        self._read_state(self.values)
        return self.values.snapshot(self._labels)


def read_routes(values: Values, routes: Iterable[ModelRoute]) -> None:
    """Sets what is known of each model's replicas."""
    for route in routes:
        values.set(names.REPLICAS_HEALTHY, route.health.num_healthy, route.model.name)
        values.set(names.REPLICAS_LOST, route.health.num_lost, route.model.name)
        values.set(names.REPLICA_LOSSES, route.health.num_request_losses, route.model.name)


def deployment_meter(request: Request) -> Meter:
    """The meter of the deployment that runs this code."""
    deployment: Any = serve.get_replica_context().servable_object
    meter: Meter = deployment.metrics_of_http.request
    return meter


def _route(request: Request) -> str:
    """The path of the request's route, with its parameters' names; "other" if there is none."""
    route = request.scope.get("route")
    if route is not None:
        return str(route.path)
    path = route_path(request)
    known = (
        {getattr(each, "path", None) for each in request.scope["app"].routes}
        if "app" in request.scope
        else ()
    )
    return path if path in known else "other"
