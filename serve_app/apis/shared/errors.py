"""Errors as HTTP has them: a status and OpenAI's error object."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import pydantic_core

from qwen3_dist.errors import ContextLengthError, EngineDeadError, QwenDistError, RequestError

# What client libraries tell apart by more than the status, by it and the field.
_CODES: dict[tuple[int, str | None], str] = {
    (HTTPStatus.NOT_FOUND, "model"): "model_not_found",
    (HTTPStatus.UNAUTHORIZED, None): "invalid_api_key",
    (HTTPStatus.TOO_MANY_REQUESTS, None): "rate_limit_exceeded",
}


def error_status(error: Exception) -> int:
    """The HTTP status that `error` is answered with."""
    if isinstance(error, RequestError):
        return error.status
    return (
        HTTPStatus.SERVICE_UNAVAILABLE
        if isinstance(error, EngineDeadError)
        else HTTPStatus.INTERNAL_SERVER_ERROR
    )


def error_message(error: Exception) -> str:
    """What clients are told. The text of an error that is none of ours stays in the log."""
    unforeseen = "the service failed on this request; its log says why"
    return str(error) if isinstance(error, QwenDistError) else unforeseen


def error_object(error: Exception) -> dict[str, Any]:
    """OpenAI's error object."""
    message = _context_message(error) if isinstance(error, ContextLengthError) else error_message(error)
    code = error.code if isinstance(error, RequestError) else None
    return error_form(message, error_status(error), getattr(error, "param", None), code)


def error_form(
    message: str, status: int, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's error object for `message` and HTTP `status`; without a `code`, the one that these two mean."""
    kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    code = code or _CODES.get((status, param))
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _context_message(error: ContextLengthError) -> str:
    """OpenAI's sentence, which clients look for to shorten a conversation by themselves."""
    holds = f"This model's maximum context length is {error.max_model_len} tokens."
    least, length = "at least " if error.at_least else "", error.prompt_tokens
    if error.output_tokens > 1:
        return (
            f"{holds} However, you requested {length + error.output_tokens} tokens ({length} in the prompt, "
            f"{error.output_tokens} in the completion). Please reduce {error.param} or the length of the prompt."
        )
    needs = " and the answer needs at least one more" if error.output_tokens else ""
    return (
        f"{holds} However, your {error.param} resulted in {least}{length} tokens{needs}. "
        f"Please reduce the length of the {error.param}."
    )


def to_json(value: Any) -> bytes:
    """Compact UTF-8 JSON, in an eighth of the standard library's time."""
    return pydantic_core.to_json(value, inf_nan_mode="null")
