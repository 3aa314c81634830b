"""HTTP around the ingress: bodies in up to a limit, JSON, event streams and OpenAI error objects out.

These lie apart from the ingress because Serve pickles an ingress's routes while its module is still
being imported: what they use has to be importable from elsewhere.
"""

from __future__ import annotations

import hmac
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from ray import serve
from starlette.exceptions import HTTPException
from starlette.types import Send

from qwen3_dist.errors import QwenDistError, RequestError
from serve_app.protocol.errors import error_object, error_status, to_json

_JSON = "application/json"
_ERROR_HEADERS = {
    HTTPStatus.UNAUTHORIZED: {"www-authenticate": "Bearer"},
    HTTPStatus.TOO_MANY_REQUESTS: {"retry-after": "1"},
}
ErrorForm = Callable[[Exception], Mapping[str, Any]]


def make_api(error_forms: Mapping[str, ErrorForm]) -> FastAPI:
    """An application without routes. Errors take the form their path has in `error_forms`, else OpenAI's.

    Each route asks for the `api_key` of the deployment that runs it.
    """
    api = FastAPI(
        title="qwen3_dist",
        description="OpenAI-compatible inference for Qwen3.",
        dependencies=[Depends(_check_deployments_key)],
    )

    async def answer_error(
        request: Request, error: Exception, headers: Mapping[str, str] | None = None
    ) -> Response:
        form = error_forms.get(route_path(request), error_object)
        status = error_status(error)
        return json_response(form(error), status, headers or _ERROR_HEADERS.get(HTTPStatus(status)))

    async def answer_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        refused = f"{request.method} {request.url.path}: {error.detail}"
        return await answer_error(request, RequestError(refused, status=error.status_code), error.headers)

    api.exception_handler(QwenDistError)(answer_error)
    api.exception_handler(Exception)(answer_error)  # which is raised again, for Serve's log
    api.exception_handler(HTTPException)(answer_http_error)
    return api


def route_path(request: Request) -> str:
    """The request's path as routes have it: without the prefix that Serve may run the application under."""
    path: str = request.scope["path"]
    return path.removeprefix(request.scope.get("root_path", ""))


def check_key(request: Request, key: str) -> None:
    """Raises RequestError (401) unless the request to an API shows the `key`; the comparison takes the same time."""
    if not key or not route_path(request).startswith("/v1/"):
        return
    headers = request.headers
    scheme, _, token = headers.get("authorization", "").partition(" ")
    shown = token if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    if not hmac.compare_digest(shown.strip().encode(), key.encode()):
        raise RequestError(
            "the API key is missing or wrong; send it as Authorization: Bearer KEY or as x-api-key",
            status=HTTPStatus.UNAUTHORIZED,
        )


async def _check_deployments_key(request: Request) -> None:
    deployment: Any = serve.get_replica_context().servable_object
    check_key(request, deployment.api_key)


async def read_body(request: Request, limit: int) -> bytes:
    """The request's body, which its headers must not call anything but JSON.

    Raises RequestError, with status 413 once it is longer than `limit` bytes.
    """
    kind = request.headers.get("content-type", _JSON).partition(";")[0].strip().lower()
    if kind != _JSON:
        raise RequestError(f"the content type must be {_JSON}, not {kind}")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise RequestError(
                f"the request body is larger than {limit} bytes; send a shorter one",
                status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            )
    return bytes(body)


def json_response(
    value: Any, status: int = HTTPStatus.OK, headers: Mapping[str, str] | None = None
) -> Response:
    """`value`, or bytes that are JSON already."""
    body = value if isinstance(value, bytes) else to_json(value)
    return Response(body, status, headers, media_type=_JSON)


class EventStream(StreamingResponse):
    """Server-sent events: `first`, then `items`, which are closed also when the client leaves.

    An error of ours out of `items` becomes the last events, in the API's form.
    """

    def __init__(
        self, first: bytes, items: AsyncGenerator[bytes, None], error_events: Callable[[Exception], bytes]
    ) -> None:
        self._events = _chain(first, items, error_events)
        super().__init__(self._events, media_type="text/event-stream", headers={"cache-control": "no-cache"})

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._events):
            await super().stream_response(send)


async def _chain(
    first: bytes, items: AsyncGenerator[bytes, None], error_events: Callable[[Exception], bytes]
) -> AsyncGenerator[bytes, None]:
    async with aclosing(items):
        yield first
        try:
            async for item in items:
                yield item
        except QwenDistError as error:
            yield error_events(error)
