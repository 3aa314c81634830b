"""The form that errors have in the API that a request belongs to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from serve_app.apis.messages.answer import message_error
from serve_app.apis.shared.errors import error_object

ANTHROPIC = "anthropic-version"  # the header that all of Anthropic's clients send
_ANTHROPIC_PATHS = ("/v1/messages", "/v1/messages/count_tokens")


def error_form(path: str, names_anthropic: bool) -> Callable[[Exception], dict[str, Any]]:
    """What makes an error's JSON for a request to `path`; whether its headers have ANTHROPIC.

    Anthropic's clients ask for its own paths, and for others that OpenAI's API has too.
    """
    return message_error if names_anthropic or path.endswith(_ANTHROPIC_PATHS) else error_object
