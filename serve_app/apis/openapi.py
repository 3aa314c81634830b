"""What the OpenAPI page says of a route: its body, as the parser's own table has it, its answers and its errors."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from serve_app.apis.shared.body import Body
from serve_app.apis.shared.kinds import TEXT, Field, Json, Kind, Record, one_of
from serve_app.apis.shared.schema import schema_of

_STATUSES = (
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.UNAUTHORIZED,
    HTTPStatus.FORBIDDEN,
    HTTPStatus.NOT_FOUND,
    HTTPStatus.METHOD_NOT_ALLOWED,
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.UNPROCESSABLE_ENTITY,
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.INTERNAL_SERVER_ERROR,
    HTTPStatus.SERVICE_UNAVAILABLE,
)


def _object(**fields: Field) -> Record:
    return Record("an object", fields)


_MESSAGE = Field(TEXT, "One sentence that says what to change.", required=True)
OPENAI_ERROR = _object(
    error=Field(
        _object(
            message=_MESSAGE,
            type=Field(TEXT, required=True),
            param=Field(TEXT, "The path of the field that is to blame."),
            code=Field(TEXT),
        ),
        required=True,
    )
)
ANTHROPIC_ERROR = _object(
    type=Field(one_of("error"), required=True),
    error=Field(_object(type=Field(TEXT, required=True), message=_MESSAGE), required=True),
)


def route(
    summary: str,
    body: Kind | type[Body] | None = None,
    streams: bool = False,
    error: Kind = OPENAI_ERROR,
) -> dict[str, Any]:
    """Keyword arguments of FastAPI's route decorators."""
    answered: Json = {"application/json": {"schema": {"type": "object"}}}
    if streams:
        answered["text/event-stream"] = {}
    refused = {"application/json": {"schema": error.schema}}
    responses: dict[int | str, Any] = {
        int(status): {"description": status.phrase, "content": refused} for status in _STATUSES
    }
    responses[200] = {"description": "The answer", "content": answered}
    described: dict[str, Any] = {"summary": summary, "responses": responses}
    if body:
        content = {"application/json": {"schema": body.schema if isinstance(body, Kind) else schema_of(body)}}
        described["openapi_extra"] = {"requestBody": {"required": True, "content": content}}
    return described
