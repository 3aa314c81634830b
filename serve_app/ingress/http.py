"""HTTP of the ingress: the gate before each request, bodies up to a limit, JSON responses and error objects.

This is not in `deployment` because Serve pickles the routes of an ingress while that module is still being imported.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from ray import serve
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route
from starlette.types import Message, Receive, Scope, Send

from qwen3_dist.errors import QwenDistError, RequestError
from serve_app.apis.error_forms import ANTHROPIC, error_form
from serve_app.apis.shared.errors import error_status, to_json
from serve_app.failures import log_internal_error
from serve_app.ingress.access_log import access_line, access_record
from serve_app.ingress.admission import (
    MAX_IN_FLIGHT_HEADER,
    REFUSE_FOR_HEADER,
    OverloadedError,
    QueueFullError,
    queue_headers,
)
from serve_app.ingress.docs_page import add_docs
from serve_app.ingress.page import add_page, is_page
from serve_app.ingress.sending import keeps_unsent, track_unsent

logger = logging.getLogger("ray.serve")
_JSON = "application/json"
_KEYLESS = ("/health", "/ready", "/version", "/metrics")
_HEADERS = "qwen3_dist.headers"
Gate = Callable[[Request], Response | None]
Endpoint = Callable[[Request], Awaitable[Response]]
Method = TypeVar("Method", bound=Callable[..., Any])
Meter = Callable[
    [Request, Send], AbstractContextManager[Send]
]  # counts a request answered by the send that it gives


class Api(FastAPI):
    """An application that calls `gate` for each request before it reads the body.

    `gate` may return a response, which ends the request. If it raises RequestError, `refuse` makes the response.
    `meter_of` returns what counts a request.
    """

    gate: Gate
    meter_of: Callable[[Request], Meter]
    refuse: Callable[[Request, RequestError], Response]
    answer_error: Callable[[Request, Exception], Awaitable[Response]]

    def __init__(self, **options: Any) -> None:
        self._direct: dict[str, Route] = {}  # by their paths
        super().__init__(**options)

    def post_directly(self, path: str, **description: Any) -> Callable[[Method], Method]:
        """A decorator as `post`, for methods of a deployment that take the request alone.

        `__call__` calls them itself. FastAPI and Starlette would pass a request through nine layers, and compare its
        path with that of each route. Serve compares paths too, so a plain route stands in front of all others.
        """

        def add(method: Method) -> Method:
            endpoint = functools.partial(_ask_deployment, method.__name__)
            route = _DirectRoute(path, endpoint, methods=["POST"], include_in_schema=False)
            self.router.routes.insert(len(self._direct), route)
            self._direct[path] = route
            return self.post(path, **description)(method)

        return add

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            track_unsent(scope, send)
            scope["app"] = self
            request = Request(scope)
            with (
                access_line(scope, send, adds_header=not keeps_unsent(scope)) as send,
                self.meter_of(request)(request, send) as send,
            ):
                try:
                    answer = self.gate(request)
                except RequestError as error:
                    answer = self.refuse(request, error)
                send = _with_headers(scope, send)
                if answer is not None:
                    await answer(scope, receive, send)
                    return
                direct = self._direct.get(route_path(request)) if request.method == "POST" else None
                if direct is None:
                    await super().__call__(scope, receive, send)
                else:
                    scope["route"] = direct
                    response = await self._ask(direct.endpoint, Request(scope, receive))
                    await response(scope, receive, send)
            return
        await super().__call__(scope, receive, send)

    async def _ask(self, endpoint: Endpoint, request: Request) -> Response:
        """What an endpoint answers, errors included."""
        try:
            return await endpoint(request)
        except Exception as error:  # noqa: BLE001 - bugs are answered too
            return await self.answer_error(request, error)


class _DirectRoute(Route):
    """A plain route that is noted in the scope, as those of FastAPI are, for metrics and traces."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, found = super().matches(scope)
        return match, {**found, "route": self} if found else found


async def _ask_deployment(method: str, request: Request) -> Response:
    response: Response = await getattr(_deployment(), method)(request)
    return response


def _deployment() -> Any:
    """The Serve deployment that runs this code."""
    return serve.get_replica_context().servable_object


def _with_headers(scope: Scope, send: Send) -> Send:
    """A `send` that adds the headers of `add_headers` to the response."""
    headers = scope.get(_HEADERS)
    if not headers:
        return send

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *headers]}
        await send(message)

    return send_with_headers


def deployment_gate(request: Request) -> Response | None:
    """Calls `check_request` of the Serve deployment that runs this code."""
    answer: Response | None = _deployment().check_request(request)
    return answer


def unmetered(request: Request) -> Meter:
    """A meter that counts nothing."""
    return lambda request, send: nullcontext(send)


def make_api(gate: Gate = deployment_gate, meter_of: Callable[[Request], Meter] = unmetered) -> Api:
    """An application without routes. Errors are answered in the error format of the request's API."""
    api = Api(
        title="qwen3_dist",
        description="OpenAI-compatible inference for Qwen3.",
        docs_url=None,
        redoc_url=None,
    )
    add_docs(api)
    add_page(api)

    def refuse(request: Request, error: Exception, headers: Mapping[str, str] | None = None) -> Response:
        form = error_form(request.scope["path"], is_anthropic(request))
        return json_response(form(error), error_status(error), headers or error_headers(error))

    async def answer_error(request: Request, error: Exception) -> Response:
        known = error
        if not isinstance(error, QwenDistError):
            known = log_internal_error(error, logger, request_id(request))
        return refuse(request, known)

    async def answer_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}"
        headers = error.headers
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            headers = {"allow": ", ".join(_allowed_methods(request))}
        return refuse(request, RequestError(message, status=error.status_code), headers)

    api.gate, api.refuse, api.answer_error, api.meter_of = gate, refuse, answer_error, meter_of
    api.exception_handler(QwenDistError)(answer_error)
    api.exception_handler(Exception)(answer_error)
    api.exception_handler(HTTPException)(answer_http_error)
    return api


def _allowed_methods(request: Request) -> list[str]:
    """The methods of all routes of the request's path. Starlette's own `allow` header covers the first route only."""

    def matches(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)

    return [method for method in ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT") if matches(method)]


def error_headers(error: Exception) -> Mapping[str, str] | None:
    """Response headers for `error`: retry-after, whether clients should retry, and the authentication scheme."""
    status = error_status(error)
    if isinstance(error, OverloadedError):
        values = {
            "retry-after": error.retry_after_s,
            REFUSE_FOR_HEADER: error.refuse_for_ms,
            MAX_IN_FLIGHT_HEADER: error.limit,
        }
        return {name: str(value) for name, value in values.items()}
    if isinstance(error, QueueFullError):
        return queue_headers(error.retry_after_s)
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        return {"retry-after": str(getattr(error, "retry_after_s", 1))}
    if status == HTTPStatus.REQUEST_TIMEOUT:  # OpenAI clients retry a 408 unless told not to
        return {"x-should-retry": "false", "connection": "close"}
    return {"www-authenticate": "Bearer"} if status == HTTPStatus.UNAUTHORIZED else None


def request_id(request: Request) -> str:
    """The id that the client sent as x-request-id, or a new one."""
    return access_record(request.scope).request_id


def is_anthropic(request: Request) -> bool:
    """Whether the request comes from a client of Anthropic's API, by its header."""
    return ANTHROPIC in request.headers


def route_path(request: Request) -> str:
    """The request's path without the route prefix under which Serve runs the application."""
    path: str = request.scope["path"]
    return path.removeprefix(request.scope.get("root_path", ""))


def needs_no_key(request: Request) -> bool:
    """Whether the request's path is answered without a key."""
    path = route_path(request)
    return path in _KEYLESS or is_page(path)


def add_headers(request: Request, headers: Mapping[str, str]) -> None:
    """Adds `headers` to the response of a request, whatever it is; for a gate to call."""
    request.scope.setdefault(_HEADERS, []).extend(
        (name.encode(), value.encode("latin-1")) for name, value in headers.items()
    )


async def read_body(request: Request, limit: int, timeout_s: float = 0.0) -> bytes:
    """Reads the body. `limit` is in bytes; a `timeout_s` of 0 means no timeout.

    Raises RequestError if the content type is not JSON (400), the body is larger than `limit` (413), or it takes
    longer than `timeout_s` seconds (408).
    """
    kind = request.headers.get("content-type", _JSON).partition(";")[0].strip().lower()
    if kind != _JSON:
        raise RequestError(f"the content type must be {_JSON}, not {kind}")
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s or None) as time_limit:
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise RequestError(
                        f"the request body is larger than {limit} bytes; send a shorter one",
                        status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                    )
    except TimeoutError:
        if not time_limit.expired():
            raise
        raise RequestError(
            f"the request body took longer than {timeout_s:g} seconds to arrive; send it faster",
            status=HTTPStatus.REQUEST_TIMEOUT,
        ) from None
    return bytes(body)


def json_response(
    value: Any, status: int = HTTPStatus.OK, headers: Mapping[str, str] | None = None
) -> Response:
    """A JSON response. `value` is serialised unless it is bytes, which must be JSON already."""
    body = value if isinstance(value, bytes) else to_json(value)
    return Response(body, status, headers, media_type=_JSON)
