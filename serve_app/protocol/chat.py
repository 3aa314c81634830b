"""Bodies of /v1/chat/completions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qwen3_dist.errors import RequestError
from qwen3_dist.text.chat_template import ChatTemplate
from qwen3_dist.text.tokenizer import Tokenizer
from serve_app.answers.base import Answer, Served
from serve_app.answers.chat import ChatAnswer
from serve_app.protocol.fields import Fields, is_bool, is_filled_list, is_int, is_list_of, short
from serve_app.protocol.generation import GenerationRequest, check_sampling, read_shared

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class ChatRequest(GenerationRequest):
    """A body of /v1/chat/completions."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    def prompt_token_ids(self, tokenizer: Tokenizer | None, template: ChatTemplate | None) -> list[list[int]]:
        if tokenizer is None or template is None:
            lacks = "tokenizer" if tokenizer is None else "chat template"
            raise RequestError(
                f"this model has no {lacks}, so it cannot chat; use /v1/completions", param="messages"
            )
        return [tokenizer.encode(template.render(self.messages, self.tools, **self.template_kwargs))]

    def answer(self, served: Served) -> Answer:
        return ChatAnswer(served, self.include_usage)


def parse_chat(body: bytes) -> ChatRequest:
    """Reads a chat request. Raises RequestError."""
    return ChatRequest(**chat_fields(Fields.of_body(body)))


def chat_fields(fields: Fields) -> dict[str, Any]:
    """Constructor arguments of a ChatRequest. Raises RequestError.

    APIs that are chats in other words translate their body into chat's and read it by this.
    """
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
    messages = fields.read("messages", is_filled_list, "a list of at least one message")
    return {
        **shared,
        "messages": [_message(message, i) for i, message in enumerate(messages)],
        "tools": fields.read("tools", lambda v: v == [] or is_list_of(dict)(v), "a list of objects", None),
        "template_kwargs": fields.read(
            "chat_template_kwargs",
            lambda v: isinstance(v, dict) and not v.keys() & {"self", "messages", "tools"},
            "an object of template variables other than messages and tools",
            {},
        ),
    }


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
