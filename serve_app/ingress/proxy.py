"""Middlewares of Serve's HTTP proxies; the one here refuses requests early while the service is overloaded.

A refusal by the ingress costs some milliseconds, and an overloaded service refuses hundreds of requests a second. So
each proxy counts its own requests in flight and refuses those beyond the limit that the service last reported. When
the service itself answers 429, which happens if there are several proxies, the proxy refuses for the reported time
too.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from http import HTTPStatus

from ray import serve
from ray.serve.exceptions import RayServeException
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.apis.error_forms import ANTHROPIC, error_form
from serve_app.apis.shared.errors import to_json
from serve_app.ingress.admission import MAX_IN_FLIGHT_HEADER, REFUSE_FOR_HEADER, OverloadedError, with_jitter
from serve_app.ingress.lost_requests import LostRequestMiddleware

IMPORT_PATH = "serve_app.ingress.proxy.middlewares"  # for Serve's setting
_PROBE_PERIOD_S = 1.0  # a full proxy lets one request through this often, since the limit may have grown
_MAX_PATHS = 64


def middlewares() -> list[Middleware]:
    """The middlewares that Serve adds to each of its proxies, the innermost first. With HAProxy it adds them to each
    ingress too, which is lost with its own requests."""
    overload = Middleware(OverloadMiddleware)
    return [overload] if _is_in_replica() else [Middleware(LostRequestMiddleware), overload]


def _is_in_replica() -> bool:
    try:
        serve.get_replica_context()
    except RayServeException:
        return False
    return True


@dataclass
class _PathLimit:
    """The limit that the service last reported for a path. Times are of the monotonic clock."""

    limit: int  # requests in flight
    refuse_until_s: float = 0.0
    retry_after_s: int = 1
    probe_s: float = 0.0  # when the next request may pass although the limit is reached

    def refuses(self, in_flight: int) -> bool:
        """Whether to refuse the next request while `in_flight` others run."""
        now = time.monotonic()
        if now <= self.refuse_until_s:
            return True
        if in_flight < self.limit:
            return False
        if now <= self.probe_s:
            return True
        self.probe_s = now + _PROBE_PERIOD_S
        return False


class OverloadMiddleware:
    """Refuses POST requests (429) while their path is at its limit, and passes all others on."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._limits: dict[str, _PathLimit] = {}  # by path
        self._in_flight: Counter[str] = Counter()  # by path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        known = self._limits.get(path)
        if known is not None and known.refuses(self._in_flight[path]):
            await _refusal(scope, known)(scope, receive, send)
            return

        async def learn(message: Message) -> None:
            await send(self._learn(path, message) if message["type"] == "http.response.start" else message)

        self._in_flight[path] += 1
        try:
            await self._app(scope, receive, learn)
        finally:
            self._in_flight[path] -= 1
            if not self._in_flight[path]:
                del self._in_flight[path]

    def _learn(self, path: str, start: Message) -> Message:
        """Records the limits that the answer's headers report. Returns its first message without these headers."""
        headers = dict(start["headers"])
        limit = int(headers.pop(MAX_IN_FLIGHT_HEADER.encode(), 0))
        refuse_for_ms = int(headers.pop(REFUSE_FOR_HEADER.encode(), 0))
        others = {**start, "headers": list(headers.items())}
        if not limit:
            return others
        if path not in self._limits and len(self._limits) >= _MAX_PATHS:
            self._limits.clear()
        known = self._limits.setdefault(path, _PathLimit(limit, probe_s=time.monotonic() + _PROBE_PERIOD_S))
        known.limit = limit
        if refuse_for_ms:
            known.refuse_until_s = time.monotonic() + refuse_for_ms / 1000
            known.retry_after_s = int(headers[b"retry-after"])
        return others


def _refusal(scope: Scope, known: _PathLimit) -> Response:
    """The 429 that the service would answer, with a jittered retry-after."""
    error = OverloadedError(known.limit, with_jitter(known.retry_after_s))
    is_anthropic = any(name.lower() == ANTHROPIC.encode() for name, _ in scope["headers"])
    return Response(
        to_json(error_form(scope["path"], is_anthropic)(error)),
        HTTPStatus.TOO_MANY_REQUESTS,
        {"retry-after": str(error.retry_after_s)},
        media_type="application/json",
    )
