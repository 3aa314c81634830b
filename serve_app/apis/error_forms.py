"""The error format of the API that a request belongs to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from serve_app.apis.messages.answer import message_error, message_error_event
from serve_app.apis.responses.answer import next_error_event
from serve_app.apis.shared.answer import error_events
from serve_app.apis.shared.errors import error_object

ANTHROPIC = "anthropic-version"  # a header that all clients of Anthropic's API send
_ANTHROPIC_PATHS = ("/v1/messages", "/v1/messages/count_tokens")
_RESPONSES_PATH = "/v1/responses"


def error_form(path: str, names_anthropic: bool) -> Callable[[Exception], dict[str, Any]]:
    """Returns the function that serializes errors for a request to `path`.

    `names_anthropic` tells whether the request has the header ANTHROPIC, which marks Anthropic's clients on paths that
    both APIs have, such as /v1/models.
    """
    return message_error if names_anthropic or path.endswith(_ANTHROPIC_PATHS) else error_object


def stream_error_form(path: str) -> Callable[[Exception, bytes], bytes]:
    """Returns the function that makes the events that end a stream of `path`, of an error and the events sent last."""
    if path.endswith(_ANTHROPIC_PATHS):
        return message_error_event
    return next_error_event if path.endswith(_RESPONSES_PATH) else error_events
