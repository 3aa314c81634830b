"""Middleware of Serve's HTTP proxies that sends a request again whose ingress was lost before it began to answer.

Serve's proxy picks another ingress only for requests that the lost one had not accepted yet. Of the others it sends no
answer at all, or none of the rest, by which this middleware knows them. So a lost ingress costs streams that had
begun, and nothing else. These end with an error event, in the form of their API.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen3_dist.errors import EngineDeadError
from serve_app.apis.error_forms import ANTHROPIC, error_form, stream_error_form
from serve_app.apis.shared.answer import last_events
from serve_app.apis.shared.errors import to_json

_LOST = "the process that had this request was lost; send it again"
# Before each try. Ray may take long to see that an ingress was lost with its node.
_PAUSES_S = (0.0, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0)
_REPEATED = ("GET", "HEAD", "POST")  # methods; a DELETE that came through would be 404 the second time
MAX_KEPT_BYTES = 2**20  # of a request's body; a longer one is not sent again


class LostRequestMiddleware:
    """Sends lost requests again; those that cannot be, or are lost again and again, are answered 503. Streams that had
    begun end with an error event."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(receive)
        begun = streams = False
        sent = b""  # the last events

        async def observed(message: Message) -> None:
            nonlocal begun, streams, sent
            begun = True
            sent = last_events(message.get("body", b""), sent)
            if message["type"] == "http.response.start":
                streams = _is_event_stream(message)
            elif not message.get("more_body", False):
                streams = False
            body.forget()
            await send(message)

        for pause_s in _PAUSES_S if scope["method"] in _REPEATED else (0.0,):
            await asyncio.sleep(pause_s)  # in which the try before ends what still waits for the body
            # Serve changes the scope of a request that it routes.
            await self._app({**scope, "headers": list(scope["headers"])}, body.receive, observed)
            if streams and not body.client_left:  # each message before had whole events
                events = stream_error_form(scope["path"])(EngineDeadError(_LOST), sent)
                await send({"type": "http.response.body", "body": events, "more_body": False})
            if begun or body.client_left:
                return
            if not body.rewind():
                break
        await _refusal(scope)(scope, receive, send)


class _Body:
    """The messages of a request, from the first again after each `rewind`."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._kept: list[Message] | None = []
        self._num_bytes = self._next = 0
        self.client_left = False

    async def receive(self) -> Message:
        """The next message."""
        if self._kept is not None and self._next < len(self._kept):
            self._next += 1
            return self._kept[self._next - 1]
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.client_left = True
        elif self._kept is not None:
            self._kept.append(message)
            self._next = len(self._kept)
            self._num_bytes += len(message.get("body", b""))
            if self._num_bytes > MAX_KEPT_BYTES:
                self.forget()
        return message

    def forget(self) -> None:
        """Keeps no messages any more."""
        self._kept = None

    def rewind(self) -> bool:
        """Returns False if the messages were not kept."""
        self._next = 0
        return self._kept is not None


def _is_event_stream(start: Message) -> bool:
    """Whether an answer that begins so is a stream of events."""
    headers = {name.lower(): value for name, value in start.get("headers", ())}
    return headers.get(b"content-type", b"").startswith(b"text/event-stream")


def _refusal(scope: Scope) -> Response:
    error = EngineDeadError(_LOST)
    is_anthropic = any(name.lower() == ANTHROPIC.encode() for name, _ in scope["headers"])
    return Response(
        to_json(error_form(scope["path"], is_anthropic)(error)),
        HTTPStatus.SERVICE_UNAVAILABLE,
        {"retry-after": "1"},
        media_type="application/json",
    )
