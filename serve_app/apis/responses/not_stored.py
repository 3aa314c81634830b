"""The errors of requests that refer to a response which is not stored, in OpenAI's words."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from qwen3_dist.errors import RequestError


class NotStoredError(RequestError):
    """A request refers to the response `response_id`, which is not stored (404)."""

    def __init__(
        self, response_id: str, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message, param, HTTPStatus.NOT_FOUND, code)
        self.response_id = response_id

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.response_id, str(self), self.param, self.code)


def response_not_found(response_id: str) -> NotStoredError:
    return NotStoredError(response_id, f"Response with id '{response_id}' not found.")


def previous_not_found(response_id: str) -> NotStoredError:
    return NotStoredError(
        response_id,
        f"Previous response with id '{response_id}' not found.",
        "previous_response_id",
        "previous_response_not_found",
    )


def item_not_found(response_id: str, item_id: str) -> NotStoredError:
    return NotStoredError(
        response_id,
        f"Item with id '{item_id}' not found. Items are not persisted when `store` is set to false. Try again with "
        "`store` set to true, or remove this item from your input.",
        "input",
    )
