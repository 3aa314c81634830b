"""What Serve's HTTP proxies do for us before they ask anybody: refuse what the service would refuse.

To refuse a request costs an ingress, and the way to it, some milliseconds, and an overloaded service refuses hundreds
a second. So a proxy counts the requests it has in flight and refuses more than the service says it takes; and where
the service refuses nevertheless, since others ask it too, so does the proxy for as long as that holds.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from http import HTTPStatus

from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.apis.error_forms import ANTHROPIC, error_form
from serve_app.apis.shared.errors import to_json
from serve_app.ingress.admission import HOLDS_HEADER, LIMIT_HEADER, OverloadedError, spread

IMPORT_PATH = "serve_app.ingress.proxy.middlewares"  # what Serve is told
_ASK_EVERY_S = 1.0  # one request more than the limit, which may have grown
_MOST_PATHS = 64


def middlewares() -> list[Middleware]:
    """The middlewares of a proxy."""
    return [Middleware(Refusals)]


@dataclass
class _Room:
    """What the service said last about a path: how many may be in flight, and how long it refuses all.

    Times are of the monotonic clock.
    """

    limit: int
    refuses_until_s: float = 0.0
    retry_after_s: int = 1
    ask_s: float = 0.0

    def refuses(self, in_flight: int) -> bool:
        """Whether the next request is refused, with `in_flight` before it."""
        now = time.monotonic()
        if now <= self.refuses_until_s:
            return True
        if in_flight < self.limit:
            return False
        if now <= self.ask_s:
            return True
        self.ask_s = now + _ASK_EVERY_S
        return False


class Refusals:
    """Passes POST requests on while there is room for them as far as the proxy knows, and refuses others (429)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._rooms: dict[str, _Room] = {}  # by path
        self._in_flight: Counter[str] = Counter()  # by path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        room = self._rooms.get(path)
        if room is not None and room.refuses(self._in_flight[path]):
            await _refusal(scope, room)(scope, receive, send)
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
        """An answer's first message as clients get it: without what it tells proxies."""
        headers = dict(start["headers"])
        limit = int(headers.pop(LIMIT_HEADER.encode(), 0))
        holds_ms = int(headers.pop(HOLDS_HEADER.encode(), 0))
        if not limit:
            return start
        if path not in self._rooms and len(self._rooms) >= _MOST_PATHS:
            self._rooms.clear()
        room = self._rooms.setdefault(path, _Room(limit, ask_s=time.monotonic() + _ASK_EVERY_S))
        room.limit = limit
        if holds_ms:
            room.refuses_until_s = time.monotonic() + holds_ms / 1000
            room.retry_after_s = int(headers[b"retry-after"])
        return {**start, "headers": list(headers.items())}


def _refusal(scope: Scope, room: _Room) -> Response:
    """The service's refusal as it would be now, with another time to come back than others are told."""
    error = OverloadedError(room.limit, spread(room.retry_after_s))
    named = any(name.lower() == ANTHROPIC.encode() for name, _ in scope["headers"])
    return Response(
        to_json(error_form(scope["path"], named)(error)),
        HTTPStatus.TOO_MANY_REQUESTS,
        {"retry-after": str(error.retry_after_s)},
        media_type="application/json",
    )
