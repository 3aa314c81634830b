"""HTTP around the ingress: who is let in, bodies in up to a limit, JSON and OpenAI error objects out.

These lie apart from the ingress because Serve pickles an ingress's routes while its module is still
being imported: what they use has to be importable from elsewhere.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from ray import serve
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from qwen3_dist.errors import QwenDistError, RequestError
from serve_app.apis.error_forms import ANTHROPIC, error_form
from serve_app.apis.shared.errors import error_status, to_json
from serve_app.failures import failed
from serve_app.ingress.admission import HOLDS_HEADER, LIMIT_HEADER, OverloadedError
from serve_app.ingress.docs_page import add_docs
from serve_app.ingress.sending import watch_sending

logger = logging.getLogger("ray.serve")
_JSON = "application/json"
_KEYLESS = ("/health", "/version")
_ID_LENGTH = 128  # of a request's id that its client chose
Gate = Callable[[Request], None]


class Api(FastAPI):
    """An application that asks `gate` before it does anything for a request, its body's reading included.

    `gate` raises RequestError for a request that is refused, which `refuse` answers.
    """

    gate: Gate
    refuse: Callable[[Request, RequestError], Response]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            watch_sending(scope, send)
            request = Request(scope)
            try:
                self.gate(request)
            except RequestError as error:
                await self.refuse(request, error)(scope, receive, send)
                return
        await super().__call__(scope, receive, send)


def ask_deployment(request: Request) -> None:
    """The gate of the deployment that runs this code."""
    deployment: Any = serve.get_replica_context().servable_object
    deployment.let_in(request)


def make_api(gate: Gate = ask_deployment) -> Api:
    """An application without routes. Errors take the form of the request's API."""
    api = Api(
        title="qwen3_dist",
        description="OpenAI-compatible inference for Qwen3.",
        docs_url=None,
        redoc_url=None,
    )
    add_docs(api)

    def refuse(request: Request, error: Exception, headers: Mapping[str, str] | None = None) -> Response:
        form = error_form(request.scope["path"], is_anthropic(request))
        return json_response(form(error), error_status(error), headers or error_headers(error))

    async def answer_error(request: Request, error: Exception) -> Response:
        told = error if isinstance(error, QwenDistError) else failed(logger, request_id(request))
        return refuse(request, told)

    async def answer_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        refused = f"{request.method} {request.url.path}: {error.detail}"
        headers = error.headers
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            headers = {"allow": ", ".join(_methods(request))}
        return refuse(request, RequestError(refused, status=error.status_code), headers)

    api.gate, api.refuse = gate, refuse
    api.exception_handler(QwenDistError)(answer_error)
    api.exception_handler(Exception)(answer_error)  # which is raised again, for Serve's log
    api.exception_handler(HTTPException)(answer_http_error)
    return api


def _methods(request: Request) -> list[str]:
    """The methods of all routes of the request's path; Starlette names those of the first alone."""

    def takes(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)

    return [method for method in ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT") if takes(method)]


def error_headers(error: Exception) -> Mapping[str, str] | None:
    """What clients are told of `error` beside its body: above all whether and when to try again."""
    status = error_status(error)
    if isinstance(error, OverloadedError):
        told = {"retry-after": error.retry_after_s, HOLDS_HEADER: error.holds_ms, LIMIT_HEADER: error.limit}
        return {name: str(value) for name, value in told.items()}
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        return {"retry-after": str(getattr(error, "retry_after_s", 1))}
    if status == HTTPStatus.REQUEST_TIMEOUT:  # which clients would send again by themselves
        return {"x-should-retry": "false", "connection": "close"}
    return {"www-authenticate": "Bearer"} if status == HTTPStatus.UNAUTHORIZED else None


def request_id(request: Request) -> str:
    """The id that the client gave, or Serve's proxy, which tells it to the client: its x-request-id."""
    return request.headers.get("x-request-id", "")[:_ID_LENGTH]


def is_anthropic(request: Request) -> bool:
    """Whether a client of Anthropic's API asks."""
    return ANTHROPIC in request.headers


def route_path(request: Request) -> str:
    """The request's path as routes have it: without the prefix that Serve may run the application under."""
    path: str = request.scope["path"]
    return path.removeprefix(request.scope.get("root_path", ""))


def check_key(request: Request, key: str) -> None:
    """Raises RequestError (401) unless the request shows the `key`, or asks for what needs none. The comparison takes
    the same time for all keys."""
    if key and route_path(request) not in _KEYLESS and not _shows(request, key):
        raise RequestError(
            "the API key is missing or wrong; send it as Authorization: Bearer KEY or as x-api-key",
            status=HTTPStatus.UNAUTHORIZED,
        )


def check_admin_key(request: Request, admin_key: str, api_key: str) -> None:
    """Raises RequestError (401 or 403) unless the request may change the service.

    It may if it shows the `admin_key`, or if there is neither that nor an `api_key`.
    """
    if admin_key and not _shows(request, admin_key):
        raise RequestError("this needs the admin key", status=HTTPStatus.UNAUTHORIZED)
    if api_key and not admin_key:
        raise RequestError(
            "this needs an admin key and the service has none; start it with --admin-key",
            status=HTTPStatus.FORBIDDEN,
        )


def _shows(request: Request, key: str) -> bool:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    shown = token if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
    return hmac.compare_digest(shown.strip().encode(), key.encode())


async def read_body(request: Request, limit: int, timeout_s: float = 0.0) -> bytes:
    """The request's body, which its headers must not call anything but JSON.

    Raises RequestError, with status 413 once it is longer than `limit` bytes, and 408 if it is not there after
    `timeout_s` seconds; 0: it may take as long as it likes.
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
            f"the request body took longer than {timeout_s:g} seconds to come; send it faster",
            status=HTTPStatus.REQUEST_TIMEOUT,
        ) from None
    return bytes(body)


def json_response(
    value: Any, status: int = HTTPStatus.OK, headers: Mapping[str, str] | None = None
) -> Response:
    """`value`, or bytes that are JSON already."""
    body = value if isinstance(value, bytes) else to_json(value)
    return Response(body, status, headers, media_type=_JSON)
