"""What a chat is made of: messages and tools, checked, and put as chat templates read them."""

from __future__ import annotations

import re
from typing import Any

import pydantic_core

from serve_app.protocol.kinds import (
    BOOL,
    OBJECT,
    TEXT,
    Either,
    Field,
    Json,
    ListOf,
    Plain,
    Record,
    Tagged,
    one_of,
)

_NO_FILES = "is not supported: the model reads text alone"
_FILES = ("image_url", "input_audio", "audio_url", "video_url", "file")
_PART = Tagged(
    "a content part",
    "type",
    {
        "text": Record("a text part", {"text": Field(TEXT, required=True)}),
        "refusal": Record("a refusal part", {"refusal": Field(TEXT, required=True)}),
    },
    dict.fromkeys(_FILES, _NO_FILES),
)
_CONTENT = Either("a string or a list of text parts", (TEXT, ListOf(_PART, "a list of text parts")))
_NAME_PATTERN = r"[a-zA-Z0-9_.-]{1,128}"
NAME = Plain(
    "a name of up to 128 letters, digits, dots, dashes and underscores",
    {"type": "string", "pattern": f"^{_NAME_PATTERN}$"},
    lambda value: re.fullmatch(_NAME_PATTERN, value) is not None,
)
_FUNCTION = one_of("function")
_CALLED = Record(
    "an object with name and arguments",
    {
        "name": Field(TEXT, required=True),
        "arguments": Field(Either("JSON text", (TEXT, OBJECT)), "JSON text.", required=True),
    },
)
_CALL = Record(
    "an object with id, type and function",
    {"id": Field(TEXT), "type": Field(_FUNCTION), "function": Field(_CALLED, required=True)},
)
_SAID = {"content": Field(_CONTENT, required=True), "name": Field(TEXT)}
_MESSAGE = Tagged(
    "an object with role and content",
    "role",
    {
        "system": Record("a message", _SAID),
        "developer": Record("a message", _SAID),
        "user": Record("a message", _SAID),
        "assistant": Record(
            "a message",
            {
                "content": Field(_CONTENT),
                "name": Field(TEXT),
                "reasoning_content": Field(TEXT, "What it thought before."),
                "reasoning": Field(TEXT, "The same under another name."),
                "tool_calls": Field(ListOf(_CALL, "a list of tool calls")),
            },
        ),
        "tool": Record("a message", {**_SAID, "tool_call_id": Field(TEXT)}),
    },
    {"function": "is not supported; use the role tool"},
)
MESSAGES = ListOf(_MESSAGE, "a list of at least one message", least=1)
_TOOL = Record(
    "an object with type and function",
    {
        "type": Field(_FUNCTION),
        "function": Field(
            Record(
                "an object with name and parameters",
                {
                    "name": Field(NAME, required=True),
                    "description": Field(TEXT),
                    "parameters": Field(OBJECT, "JSON schema of the arguments."),
                    "strict": Field(BOOL),
                },
            ),
            required=True,
        ),
    },
)
TOOLS = ListOf(_TOOL, "a list of tools")
_NAMED = Record(
    "an object with type and function",
    {
        "type": Field(_FUNCTION, required=True),
        "function": Field(Record("an object with name", {"name": Field(TEXT, required=True)}), required=True),
    },
)
TOOL_CHOICE = Either(
    'one of "none", "auto", "required", or an object that names a function',
    (one_of("none", "auto", "required"), _NAMED),
)


def template_message(message: Json) -> Json:
    """`message` in the words that Qwen3's templates know; arguments of calls as objects, where they are."""
    if message["role"] == "developer":
        return {**message, "role": "system"}
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [_template_call(call) for call in message["tool_calls"]]}


def plain_content(message: Json) -> str:
    """The text of a message, its parts joined."""
    content = message.get("content", "")
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def template_tool(tool: Json) -> Json:
    return {"type": "function", **tool}


def _template_call(call: Json) -> Json:
    function = {**call["function"], "arguments": _object(call["function"]["arguments"])}
    return {**call, "type": "function", "function": function}


def _object(arguments: Any) -> Any:
    """JSON text of an object as that object; anything else as it is. No arguments may be no text."""
    if not isinstance(arguments, str):
        return arguments
    try:
        value = pydantic_core.from_json(arguments or "{}", allow_inf_nan=False)
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments
