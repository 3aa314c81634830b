"""One line for each HTTP request, when it ends: whatever became of it, and what the replica counted."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Message, Scope, Send

from serve_app.apis.shared.answer import Counted
from serve_app.telemetry.summary import RequestSummary, milliseconds
from serve_app.telemetry.traces import ServerSpan, server_span

logger = logging.getLogger("qwen3_dist.access")
_RECORD = "qwen3_dist.access"
_MAX_ID_LENGTH = 128  # characters of a client's x-request-id that are kept
_PROBES = ("/health", "/ready", "/version", "/metrics")  # whose lines have the level debug
CLIENT_LEFT = 499  # the status of requests whose client left before an answer, as nginx has it
_SERVER_ERROR = 500
_ID_HEADER = b"x-request-id"
_NO_COUNTS = RequestSummary()


@dataclass(slots=True)
class AccessRecord:
    """What is known of a request so far. `key_name` and `model` are empty while unknown.

    `error_status` is the HTTP status of an error that came after the answer's headers. `resumed` counts how often a
    replica took the request in place of one that was lost; `first_token_s` is since the start.
    """

    request_id: str
    method: str
    path: str
    client: str
    span: ServerSpan | None = None
    key_name: str = ""
    model: str = ""
    summary: RequestSummary | None = None
    counted: Counted | None = None
    status: int = CLIENT_LEFT
    error_status: int | None = None
    resumed: int = 0
    first_token_s: float | None = None
    answered: bool = False  # whether the whole answer was sent
    started_s: float = field(default_factory=time.monotonic)

    def end_with(self, summary: RequestSummary) -> None:
        """Takes the counts of the replica."""
        self.summary = summary

    def count(self, item: Counted) -> None:
        """Takes the counts of a part, which hold if no summary comes."""
        self.counted = item
        if item.sent and self.first_token_s is None:
            self.first_token_s = time.monotonic() - self.started_s

    def resume(self) -> None:
        """Notes that a replica has the request in place of one that was lost."""
        self.resumed += 1

    def _counts(self) -> RequestSummary:
        """The replica's summary; else what it has counted until the request was aborted."""
        if self.summary is not None or self.counted is None:
            return self.summary or _NO_COUNTS
        counted = self.counted
        return RequestSummary(
            prompt_tokens=counted.prompt_tokens,
            completion_tokens=max(0, counted.tokens - counted.prompt_tokens),
            cached_tokens=counted.cached_tokens,
            finish_reasons=("error" if (self.error_status or 0) >= _SERVER_ERROR else "abort",),
        )

    def fields(self) -> dict[str, Any]:
        """The fields of the request's line. All lines have all of them."""
        counts = self._counts()
        told = counts.fields()
        if self.resumed and self.first_token_s is not None:  # another replica than the last one sent it
            told["ttft_ms"] = milliseconds(self.first_token_s)
        return {
            "request_id": self.request_id,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "key": self.key_name,
            **told,
            "resumed": self.resumed or None,
            "model": counts.model or self.model,
            "e2e_ms": milliseconds(time.monotonic() - self.started_s),
            "client": self.client,
            "client_gone": not self.answered,
            "error_status": self.error_status,
        }


def access_record(scope: Scope) -> AccessRecord:
    """The record of the request with `scope`; one that is never logged if nothing watches the request."""
    record: AccessRecord | None = scope.get(_RECORD)
    if record is None:
        record = scope[_RECORD] = _new_record(scope)
    return record


@contextmanager
def access_line(scope: Scope, send: Send, adds_header: bool) -> Iterator[Send]:
    """A context in which a request is answered through the `send` that it gives. At its end the line is logged.

    `adds_header`: the answer gets the header x-request-id here, since no proxy adds it.
    """
    record = scope[_RECORD] = _new_record(scope)
    probe = record.path.removeprefix(scope.get("root_path", "")) in _PROBES
    record.span = None if probe else server_span(record.method, record.path, scope)

    async def observed(message: Message) -> None:
        if message["type"] == "http.response.start":
            record.status = int(message["status"])
            if adds_header:
                message["headers"] = [*message.get("headers", ()), (_ID_HEADER, record.request_id.encode())]
        elif not message.get("more_body", False):
            record.answered = True
        await send(message)

    try:
        yield observed
    finally:
        level = logging.DEBUG if probe else logging.INFO
        if record.span is not None:
            record.span.end(record.error_status or record.status, record.request_id, scope)
        if logger.isEnabledFor(level):
            logger.log(level, "request", extra={"fields": record.fields()})


def request_id_of(scope: Scope) -> str:
    """The request's x-request-id, of which odd characters become `?`, or a new one.

    Serve's own proxy adds the header where the client sent none, and returns it to the client.
    """
    sent = next((value for name, value in scope.get("headers", ()) if name == _ID_HEADER), b"")
    text = sent.decode("latin-1")[:_MAX_ID_LENGTH]
    if text.isascii() and text.isprintable():
        return text or str(uuid.uuid4())
    return "".join(each if each.isascii() and each.isprintable() else "?" for each in text)


def _new_record(scope: Scope) -> AccessRecord:
    client = scope.get("client")
    return AccessRecord(
        request_id_of(scope), scope.get("method", ""), scope.get("path", ""), client[0] if client else ""
    )
