"""Bodies of /v1/chat/completions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qwen3_dist.errors import RequestError
from serve_app.protocol.fields import Fields, is_bool, is_filled_list, is_int, is_list_of, short
from serve_app.protocol.generation import GenerationRequest, check_sampling, read_shared

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class ChatRequest(GenerationRequest):
    """A body of /v1/chat/completions."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)


def parse_chat(body: bytes) -> ChatRequest:
    """Reads a chat request. Raises RequestError."""
    fields = Fields(body)
    shared = read_shared(
        fields, "max_completion_tokens" if fields.has("max_completion_tokens") else "max_tokens"
    )
    wanted = fields.read("logprobs", is_bool, "true or false", False)
    top = fields.read("top_logprobs", is_int, "an integer", None)
    if top is not None and not wanted:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    if wanted:
        shared["sampling"]["logprobs"] = top or 0
    shared["sampling"].setdefault("max_tokens", None)
    check_sampling(shared["sampling"], {"logprobs": "top_logprobs", "max_tokens": shared.pop("limit_name")})
    return ChatRequest(
        **shared,
        messages=[
            _message(m, i)
            for i, m in enumerate(fields.read("messages", is_filled_list, "a list of at least one message"))
        ],
        tools=fields.read("tools", lambda v: v == [] or is_list_of(dict)(v), "a list of objects", None),
        template_kwargs=fields.read(
            "chat_template_kwargs",
            lambda v: isinstance(v, dict) and not v.keys() & {"self", "messages", "tools"},
            "an object of template variables other than messages and tools",
            {},
        ),
    )


def _message(message: Any, index: int) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, dict):
        raise RequestError(
            f"{where} must be an object with role and content, not {short(message)}", param=where
        )
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(
            f"{where}.role must be one of {', '.join(ROLES)}, not {short(role)}", param=f"{where}.role"
        )
    content = message.get("content")
    if not isinstance(content, (str, list)) and not (content is None and role == "assistant"):
        raise RequestError(
            f"{where}.content must be a string or a list of text parts, not {short(content)}",
            param=f"{where}.content",
        )
    # OpenAI's newer name for the system role; Qwen3's templates know the older one.
    return {**message, "role": "system"} if role == "developer" else message
