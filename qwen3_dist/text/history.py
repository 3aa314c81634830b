"""Adapts conversations to strict chat templates: one leading system message, and call arguments that are objects.

`SYSTEM_PROBE` and `ARGUMENTS_PROBE` are conversations that test a template: one that renders every `SENTINEL` of a
probe needs no adaptation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Message = dict[str, Any]
SENTINEL = "a3f9c1e7"
SYSTEM_PROBE: list[Message] = [
    {"role": "system", "content": SENTINEL},
    {"role": "system", "content": SENTINEL},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
    {"role": "system", "content": SENTINEL},
    {"role": "user", "content": "q"},
]
ARGUMENTS_PROBE: list[Message] = [
    {"role": "user", "content": "q"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": SENTINEL}}],
    },
    {"role": "tool", "tool_call_id": "c", "content": "r"},
]


def has_late_system(messages: list[Message]) -> bool:
    """Whether any message but the first is a system message."""
    return any(message.get("role") == "system" for message in messages[1:])


def merge_system_messages(messages: list[Message]) -> list[Message]:
    """Returns `messages` with all system messages merged into one at the front."""
    texts = [message["content"] for message in messages if message.get("role") == "system"]
    others = [message for message in messages if message.get("role") != "system"]
    return [{"role": "system", "content": "\n\n".join(filter(None, texts))}, *others]


def has_non_object_arguments(messages: list[Message]) -> bool:
    """Whether any tool call in `messages` has arguments that are not an object."""
    return any(
        not isinstance(_function(call).get("arguments", {}), Mapping)
        for message in messages
        for call in _calls(message)
    )


def wrap_arguments(message: Message) -> Message:
    """Returns `message` with call arguments that are not an object wrapped as `{"arguments": ...}`."""
    calls = _calls(message)
    return {**message, "tool_calls": [_with_object(call) for call in calls]} if calls else message


def _calls(message: Message) -> list[Mapping[str, Any]]:
    """Returns the tool calls of an assistant message, [] for other roles."""
    return (message.get("tool_calls") or []) if message.get("role") == "assistant" else []


def _with_object(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = _function(call)
    arguments = function.get("arguments", {})
    if isinstance(arguments, Mapping):
        return call
    wrapped = {**function, "arguments": {"arguments": arguments}}
    return {**call, "function": wrapped} if "function" in call else wrapped


def _function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the object with name and arguments, which some clients send without the `function` wrapper."""
    function: Mapping[str, Any] = call.get("function") or call
    return function
