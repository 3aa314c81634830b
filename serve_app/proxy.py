"""What Serve's HTTP proxies do for us before they ask anybody: refuse again what was refused just now.

To refuse a request costs an ingress, and the way to it, some milliseconds. An overloaded service refuses hundreds a
second, so a proxy gives the same answer to the same path for as long as the refusal says it holds.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from http import HTTPStatus

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.admission import spread

# Serve's setting for a function that returns middlewares of its proxies, and ours for it.
SETTING = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
IMPORT_PATH = "serve_app.proxy.middlewares"
HOLDS_HEADER = "x-refusal-holds-ms"  # of a refusal; it does not reach clients
_MOST_PATHS = 64
_OF_ONE_REQUEST = b"x-request-id"
_RETRY_AFTER = b"retry-after"


def middlewares() -> list[Middleware]:
    """The middlewares of a proxy."""
    return [Middleware(RepeatedRefusals)]


@dataclass(frozen=True)
class _Refusal:
    """An answer that holds until a time of the monotonic clock."""

    until_s: float
    messages: list[Message]


class RepeatedRefusals:
    """Answers POST requests to a path as the one before them was, while its refusal holds."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._refusals: dict[str, _Refusal] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        refusal = self._refusals.get(scope["path"])
        if refusal is None or time.monotonic() > refusal.until_s:
            await self._app(scope, receive, self._remembering(scope["path"], send))
            return
        for message in refusal.messages:
            await send(_spread(message))

    def _remembering(self, path: str, send: Send) -> Send:
        """`send` for the answer to a request to `path`, which is remembered if it is a refusal that holds."""
        holds_ms = 0
        messages: list[Message] = []

        async def watch(message: Message) -> None:
            nonlocal holds_ms
            if message["type"] == "http.response.start" and message["status"] == HTTPStatus.TOO_MANY_REQUESTS:
                headers = dict(message["headers"])
                holds_ms = int(headers.pop(HOLDS_HEADER.encode(), 0))
                message = {**message, "headers": list(headers.items())}
                headers = {name: value for name, value in headers.items() if name.lower() != _OF_ONE_REQUEST}
                messages.append({**message, "headers": list(headers.items())})
            elif holds_ms:
                messages.append(message)
            if holds_ms and message["type"] == "http.response.body" and not message.get("more_body", False):
                if len(self._refusals) >= _MOST_PATHS:
                    self._refusals.clear()
                self._refusals[path] = _Refusal(time.monotonic() + holds_ms / 1000, messages)
            await send(message)

        return watch


def _spread(message: Message) -> Message:
    """A refusal's message as another client is sent it, who is to come back at another time."""
    headers = [
        (name, b"%d" % spread(int(value)) if name.lower() == _RETRY_AFTER else value)
        for name, value in message.get("headers", ())
    ]
    return {**message, "headers": headers} if headers else dict(message)
