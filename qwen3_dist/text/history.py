"""Conversations put so that a strict chat template takes them: one system message, arguments that are objects.

Templates differ in what they take. `SYSTEM_PROBE` and `ARGUMENTS_PROBE` are conversations that show which kind one is:
a template that copes shows every `SENTINEL` of the probe.
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
    """Whether a system message is not the first of `messages`."""
    return any(message.get("role") == "system" for message in messages[1:])


def merge_system_messages(messages: list[Message]) -> list[Message]:
    """`messages` with the text of all system messages in one at the front."""
    texts = [message["content"] for message in messages if message.get("role") == "system"]
    others = [message for message in messages if message.get("role") != "system"]
    return [{"role": "system", "content": "\n\n".join(filter(None, texts))}, *others]


def has_non_object_arguments(messages: list[Message]) -> bool:
    """Whether a tool call in `messages` has arguments that are no object."""
    return any(
        not isinstance(_function(call).get("arguments", {}), Mapping)
        for message in messages
        for call in _calls(message)
    )


def wrap_arguments(message: Message) -> Message:
    """`message` with arguments of calls that are no object as the only value of one."""
    calls = _calls(message)
    return {**message, "tool_calls": [_with_object(call) for call in calls]} if calls else message


def _calls(message: Message) -> list[Mapping[str, Any]]:
    """The calls of an assistant's message; others may have anything under that name."""
    return (message.get("tool_calls") or []) if message.get("role") == "assistant" else []


def _with_object(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = _function(call)
    arguments = function.get("arguments", {})
    if isinstance(arguments, Mapping):
        return call
    wrapped = {**function, "arguments": {"arguments": arguments}}
    return {**call, "function": wrapped} if "function" in call else wrapped


def _function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """The name and arguments of a call, which some histories have without a wrapper."""
    function: Mapping[str, Any] = call.get("function") or call
    return function
