"""The OpenAPI page's description of a route: request body, responses and errors."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any, Literal

from pydantic import BaseModel

from serve_app.apis.shared.body import Body, Json, about
from serve_app.apis.shared.schema import schema_of

_STATUSES = (
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.UNAUTHORIZED,
    HTTPStatus.FORBIDDEN,
    HTTPStatus.NOT_FOUND,
    HTTPStatus.METHOD_NOT_ALLOWED,
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.CONFLICT,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.UNPROCESSABLE_ENTITY,
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.INTERNAL_SERVER_ERROR,
    HTTPStatus.SERVICE_UNAVAILABLE,
)


_Message = Annotated[str, about("One sentence that says what to change.")]


class _OpenAIDetails(BaseModel):
    message: _Message
    type: str
    param: Annotated[str, about("The path of the invalid field.")] | None = None
    code: str | None = None


class OpenAIError(BaseModel):
    """The body of an error in OpenAI's format."""

    error: _OpenAIDetails


class _AnthropicDetails(BaseModel):
    type: str
    message: _Message


class AnthropicError(BaseModel):
    """The body of an error in Anthropic's format."""

    type: Literal["error"]
    error: _AnthropicDetails


def route(
    summary: str,
    body: type[Body] | None = None,
    streams: bool = False,
    error: type[BaseModel] = OpenAIError,
) -> dict[str, Any]:
    """Returns the keyword arguments of FastAPI's route decorators."""
    answer_content: Json = {"application/json": {"schema": {"type": "object"}}}
    if streams:
        answer_content["text/event-stream"] = {}
    error_content = {"application/json": {"schema": schema_of(error)}}
    responses: dict[int | str, Any] = {
        int(status): {"description": status.phrase, "content": error_content} for status in _STATUSES
    }
    responses[200] = {"description": "The answer", "content": answer_content}
    arguments: dict[str, Any] = {"summary": summary, "responses": responses}
    if body:
        content = {"application/json": {"schema": schema_of(body)}}
        arguments["openapi_extra"] = {"requestBody": {"required": True, "content": content}}
    return arguments
