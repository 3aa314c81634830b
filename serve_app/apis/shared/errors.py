"""HTTP errors: the status of an exception, and OpenAI's error object."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import pydantic_core

from qwen3_dist.errors import ContextLengthError, EngineDeadError, QwenDistError, RequestError

# OpenAI's error codes by HTTP status and `param`.
_CODES: dict[tuple[int, str | None], str] = {
    (HTTPStatus.NOT_FOUND, "model"): "model_not_found",
    (HTTPStatus.UNAUTHORIZED, None): "invalid_api_key",
    (HTTPStatus.TOO_MANY_REQUESTS, None): "rate_limit_exceeded",
}


def error_status(error: Exception) -> int:
    """Returns the HTTP status for `error`."""
    if isinstance(error, RequestError):
        return error.status
    return (
        HTTPStatus.SERVICE_UNAVAILABLE
        if isinstance(error, EngineDeadError)
        else HTTPStatus.INTERNAL_SERVER_ERROR
    )


def error_message(error: Exception) -> str:
    """Returns the message for clients. The text of an unexpected exception goes to the log alone."""
    unexpected = "the service failed on this request; its log says why"
    return str(error) if isinstance(error, QwenDistError) else unexpected


def error_object(error: Exception) -> dict[str, Any]:
    """Returns OpenAI's error object for `error`."""
    message = _context_message(error) if isinstance(error, ContextLengthError) else error_message(error)
    code = error.code if isinstance(error, RequestError) else None
    return error_form(message, error_status(error), getattr(error, "param", None), code)


def error_form(
    message: str, status: int, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Returns OpenAI's error object. Without a `code`, it has OpenAI's code for `status` and `param`, if any."""
    kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    code = code or _CODES.get((status, param))
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _context_message(error: ContextLengthError) -> str:
    """Returns OpenAI's sentence for a prompt that is too long. Agents match it to compact their conversation."""
    limit = f"This model's maximum context length is {error.max_model_len} tokens."
    least, length = "at least " if error.at_least else "", error.prompt_tokens
    if error.output_tokens > 1:
        return (
            f"{limit} However, you requested {length + error.output_tokens} tokens ({length} in the prompt, "
            f"{error.output_tokens} in the completion). Please reduce {error.param} or the length of the prompt."
        )
    needs = " and the answer needs at least one more" if error.output_tokens else ""
    return (
        f"{limit} However, your {error.param} resulted in {least}{length} tokens{needs}. "
        f"Please reduce the length of the {error.param}."
    )


def to_json(value: Any) -> bytes:
    """Returns `value` as compact UTF-8 JSON. Eight times as fast as `json.dumps`."""
    return pydantic_core.to_json(value, inf_nan_mode="null")
