"""Anthropic's messages: the answer's content blocks and stream events, and the error format."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import pydantic_core

from qwen3_dist.errors import ContextLengthError
from qwen3_dist.text.choice import ChoiceDelta
from serve_app.apis.shared.answer import AnswerContext, Json, event
from serve_app.apis.shared.blocks import Block, BlockAnswer
from serve_app.apis.shared.errors import error_message, error_status

_ERROR_TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.REQUEST_TIMEOUT: "timeout_error",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded_error",
}

# On this code Anthropic's clients resend the whole conversation.
THREAD_UNSUPPORTED = "thread_unsupported_request"


def message_error(error: Exception) -> Json:
    """Returns Anthropic's error object for `error`."""
    status = error_status(error)
    kind = "api_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    message = _too_long(error) if isinstance(error, ContextLengthError) else error_message(error)
    details: Json = {"type": _ERROR_TYPES.get(HTTPStatus(status), kind), "message": message}
    if getattr(error, "code", None) == THREAD_UNSUPPORTED:
        details["details"] = {"error_code": THREAD_UNSUPPORTED}
    return {"type": "error", "error": details}


def _too_long(error: ContextLengthError) -> str:
    """Returns Anthropic's sentence for a prompt that is too long. Agents match it to compact their conversation."""
    least = "at least " if error.at_least else ""
    return (
        f"prompt is too long: {least}{error.prompt_tokens} tokens > "
        f"{error.max_model_len - error.output_tokens} maximum"
    )


def message_error_event(error: Exception, sent: bytes = b"") -> bytes:
    """Returns Anthropic's error event, which ends a stream."""
    return event(message_error(error), "error")


class MessageAnswer(BlockAnswer):
    """Serializes `message` and its stream events."""

    def __init__(self, context: AnswerContext, max_tokens: int) -> None:
        super().__init__(context)
        self._max_tokens = max_tokens
        self._content: list[Json] = []

    def begin(self) -> bytes:
        message = self._message(None)
        # Not what is counted yet, which depends on how many tokens came with the first part.
        message["usage"] |= {"output_tokens": 0, "output_tokens_details": {"thinking_tokens": 0}}
        return _event({"type": "message_start", "message": message})

    def end(self) -> bytes:
        closed = self.close()
        delta = {"stop_reason": self._stop_reason(), "stop_sequence": self._stop_sequence()}
        stop = {"type": "message_delta", "delta": delta, "usage": self._usage()}
        return closed + _event(stop) + _event({"type": "message_stop"})

    def fail(self, error: Exception) -> bytes:
        return message_error_event(error)

    def full_response(self, choices: Sequence[ChoiceDelta]) -> Json:
        self.delta(choices[0])
        self.close()
        return self._message(self._stop_reason())

    def open_block(self, block: Block) -> bytes:
        match block.kind:
            case "reasoning":
                content: Json = {"type": "thinking", "thinking": "", "signature": ""}
            case "text":
                content = {"type": "text", "text": ""}
            case _:
                content = {"type": "tool_use", "id": block.call_id, "name": block.name, "input": {}}
        start = self._event("content_block_start", new=1, content_block=content)
        self._content.append(content if block.kind != "tool_call" else {**content, "input": ""})
        return start

    def extend_block(self, block: Block, text: str) -> bytes:
        kind, part, field = {
            "reasoning": ("thinking_delta", "thinking", "thinking"),
            "text": ("text_delta", "text", "text"),
            "tool_call": ("input_json_delta", "partial_json", "input"),
        }[block.kind]
        self._content[-1][field] += text
        return self._event("content_block_delta", delta={"type": kind, part: text})

    def close_block(self, block: Block) -> bytes:
        content, signed = self._content[-1], b""
        if block.kind == "reasoning":
            # Clients only send thinking blocks back if they have a signature. This service does not verify it.
            content["signature"] = self.unique
            delta = {"type": "signature_delta", "signature": self.unique}
            signed = self._event("content_block_delta", delta=delta)
        elif block.kind == "tool_call":
            content["input"] = _arguments(content["input"])
        return signed + self._event("content_block_stop")

    def _event(self, kind: str, new: int = 0, **fields: Any) -> bytes:
        """Returns an event for the last block, or with `new=1` for the one after it."""
        return _event({"type": kind, "index": len(self._content) - 1 + new, **fields})

    def _message(self, stop_reason: str | None) -> Json:
        return {
            "id": f"msg_{self.unique}",
            "type": "message",
            "role": "assistant",
            "model": self.context.model,
            "content": self._content,
            "stop_reason": stop_reason,
            "stop_sequence": self._stop_sequence(),
            "usage": self._usage(),
        }

    def _usage(self) -> Json:
        """Returns Anthropic's usage object, whose `input_tokens` exclude cached tokens."""
        usage = self.usage
        return {
            "input_tokens": usage.prompt - usage.cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached,
            "output_tokens": usage.completion,
            "output_tokens_details": {"thinking_tokens": usage.reasoning},
        }

    def _stop_sequence(self) -> str | None:
        reason = self.last.stop_reason if self.last else None
        return reason if isinstance(reason, str) else None

    def _stop_reason(self) -> str:
        if self.last and self.last.finish_reason == "length":
            full = self.usage.completion < self._max_tokens
            return "model_context_window_exceeded" if full else "max_tokens"
        if self._stop_sequence() is not None:
            return "stop_sequence"
        called = any(block["type"] == "tool_use" for block in self._content)
        return "tool_use" if called else "end_turn"


def _event(data: Json) -> bytes:
    return event(data, data["type"])


def _arguments(text: str) -> Json:
    """Parses a call's arguments, as far as they go if the token limit cut them off.

    Arguments that are not a JSON object become Anthropic's `INVALID_JSON`, so that their text is not lost.
    """
    try:
        value = pydantic_core.from_json(text or "{}", allow_partial=True)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"INVALID_JSON": text}
