"""Chat messages and tools: their validation, and their conversion to what chat templates read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Required

import pydantic_core
from pydantic import Field
from typing_extensions import TypedDict

from serve_app.apis.shared.body import ByTag, ByType, Json, Must, about
from serve_app.apis.shared.custom_tools import CustomCall, CustomFormat, as_arguments, as_function

# The roles of templates, by other roles that clients send.
_ROLES = {"developer": "system", "function": "tool"}
# Claude Code adds this line to the system prompt. It changes with every request, which defeats the prefix cache.
_BILLING = re.compile(
    r"^[ \t]*x-anthropic-billing-header:(?:(?:[ \t]*[\w.-]+=[^;\s]*(?:;|(?=\s|$)))+|[^\n]*)[ \t]*(?:\r?\n|$)?",
    re.MULTILINE,
)
_FILES = ("image_url", "input_audio", "audio_url", "video_url", "file")
_THOUGHTS = ("thinking", "reasoning")


class _TextPart(TypedDict):
    type: Literal["text", "input_text", "output_text"]
    text: str


class _RefusalPart(TypedDict):
    type: Literal["refusal"]
    refusal: str


class _ThinkingPart(TypedDict):
    type: Literal["thinking"]
    thinking: str


class _ReasoningPart(TypedDict):
    type: Literal["reasoning"]
    text: str


_Part = Annotated[_TextPart | _RefusalPart, ByTag("type", "a content part", _FILES)]
_AssistantPart = Annotated[
    _TextPart | _RefusalPart | _ThinkingPart | _ReasoningPart, ByTag("type", "a content part", _FILES)
]
_ToolPart = Annotated[_TextPart | _RefusalPart | Json, ByTag("type", "a content part")]
_Content = Annotated[
    str | Annotated[list[Annotated[str | _Part, ByType("a content part")]], Must("a list of text parts")],
    ByType("a string or a list of text parts"),
]
_AssistantContent = Annotated[
    str
    | Annotated[
        list[Annotated[str | _AssistantPart, ByType("a content part")]], Must("a list of text parts")
    ],
    ByType("a string or a list of text parts"),
]
_ToolContent = Annotated[
    str | Annotated[list[Annotated[str | _ToolPart, ByType("a content part")]], Must("a list of parts")],
    ByType("a string or a list of parts"),
    about("A part that is not text is replaced by a placeholder."),
]
Name = Annotated[
    str,
    Field(pattern="^[a-zA-Z0-9_.-]{1,128}$"),
    Must("a name of up to 128 letters, digits, dots, dashes and underscores"),
]


class _Called(TypedDict, total=False):
    name: Required[str]
    arguments: Annotated[Any, about("Arguments as JSON text; none if absent.")]


_CalledFunction = Annotated[_Called, Must("an object with name and arguments")]


class _FunctionCall(TypedDict, total=False):
    type: Literal["function"]
    id: str
    function: Required[_CalledFunction]


class _CustomCall(TypedDict, total=False):
    type: Required[Literal["custom"]]
    id: str
    custom: Required[CustomCall]


_Calls = Annotated[
    list[
        Annotated[
            _FunctionCall | _CustomCall,
            ByTag("type", "an object with id, type and function", untagged="function"),
        ]
    ],
    Must("a list of tool calls"),
]


class _Message(TypedDict, total=False):
    role: Required[Literal["system", "developer", "user"]]
    content: Required[_Content]
    name: str


class _AssistantMessage(TypedDict, total=False):
    role: Required[Literal["assistant"]]
    content: _AssistantContent
    refusal: Annotated[str, about("Text of a refusal, used if there is no content.")]
    name: str
    reasoning_content: Annotated[str, about("Reasoning ahead of the content.")]
    reasoning: Annotated[str, about("Another name of reasoning_content.")]
    tool_calls: _Calls
    function_call: Annotated[_CalledFunction, about("A tool call in OpenAI's deprecated format.")]


class _ToolMessage(TypedDict, total=False):
    role: Required[Literal["tool"]]
    content: _ToolContent
    name: str
    tool_call_id: str


class _FunctionMessage(TypedDict, total=False):
    role: Required[Literal["function"]]
    content: _ToolContent
    name: str


Messages = Annotated[
    list[
        Annotated[
            _Message | _AssistantMessage | _ToolMessage | _FunctionMessage,
            ByTag("role", "an object with role and content"),
        ]
    ],
    Must("a list of at least one message", 1),
]


class _Function(TypedDict, total=False):
    name: Required[Name]
    description: str
    parameters: Annotated[Json, about("JSON schema of the arguments.")]
    strict: bool


class _Custom(TypedDict, total=False):
    name: Required[Name]
    description: str
    format: CustomFormat


class _FunctionTool(TypedDict, total=False):
    type: Literal["function"]
    function: Required[Annotated[_Function, Must("an object with name and parameters")]]


class _CustomTool(TypedDict):
    type: Literal["custom"]
    custom: Annotated[_Custom, Must("an object with name")]


Tools = Annotated[
    list[
        Annotated[
            _FunctionTool | _CustomTool | Json,
            ByTag("type", "an object with type and function", untagged="function"),
        ]
    ],
    Must("a list of tools"),
]


class _Named(TypedDict):
    name: str


class _ChosenFunction(TypedDict):
    type: Literal["function"]
    function: Annotated[_Named, Must("an object with name")]


class _ChosenCustom(TypedDict):
    type: Literal["custom"]
    custom: Annotated[_Named, Must("an object with name")]


class AllowedTools(TypedDict):
    """Restricts a request to some of its tools."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[Json], Must("a list of tools"), about("The tools that the model may call.")]


class _ChosenAllowed(TypedDict):
    type: Literal["allowed_tools"]
    allowed_tools: Annotated[AllowedTools, Must("an object with mode and tools")]


ToolChoice = Annotated[
    Literal["none", "auto", "required"]
    | Annotated[_ChosenFunction | _ChosenCustom | _ChosenAllowed, ByTag("type", "an object with type")],
    ByType('one of "none", "auto", "required", or an object that names a tool'),
]


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[Json]:
    """Returns `messages` as `template_message` converts them, without system messages that it left empty."""
    turns = [template_message(message) for message in messages]
    kept = [
        turn
        for turn, message in zip(turns, messages, strict=True)
        if turn["role"] != "system" or turn.get("content") or not message.get("content")
    ]
    return kept or turns


def without_billing_header(text: str) -> str:
    """Returns a system prompt without Claude Code's billing header line."""
    kept = _BILLING.sub("", text)
    return text if kept == text else kept.strip("\r\n")


def template_message(message: Mapping[str, Any]) -> Json:
    """Returns `message` with the roles and fields that Qwen3's templates read, and with parsed call arguments."""
    message = {**message, "role": _ROLES.get(message["role"], message["role"])}
    if isinstance(message.get("content"), list):
        parts = [{"type": "text", "text": p} if isinstance(p, str) else p for p in message["content"]]
        if message["role"] == "assistant":
            message |= _thoughts(message, parts)
            parts = [part for part in parts if part["type"] not in _THOUGHTS]
        message["content"] = [_text_part(part) for part in parts] or ""
    if message["role"] == "system":
        return {**message, "content": _system_content(message["content"])}
    if message["role"] == "tool":
        return {"content": "", **message}
    if message["role"] != "assistant":
        return message
    if refused := message.pop("refusal", None):
        message["content"] = message.get("content") or refused
    calls = message.get("tool_calls", [])
    if called := message.pop("function_call", None):
        calls = [*calls, {"function": called}]
    return {**message, "tool_calls": [_template_call(call) for call in calls]} if calls else message


def placeholder(kind: str) -> str:
    """Returns the text that replaces a part of a tool's result that is not text."""
    return f"[{kind} left out: the model reads text alone]"


def plain_content(message: Mapping[str, Any]) -> str:
    """Returns the text of a message, with its parts joined."""
    content = message.get("content", "")
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def template_tools(tools: Sequence[Mapping[str, Any]]) -> list[Json]:
    """Returns the tools that the client runs, as functions. Tools hosted by an API provider are left out."""
    functions = []
    for tool in tools:
        if tool["type"] == "custom":
            functions.append({"type": "function", "function": as_function(tool["custom"])})
        elif tool["type"] == "function":
            functions.append({"type": "function", **tool})
    return functions


def _thoughts(message: Json, parts: list[Json]) -> Json:
    """Returns the reasoning in `parts` of an assistant's content as a field, {} if `message` has such a field."""
    thoughts = [part.get("thinking") or part.get("text", "") for part in parts if part["type"] in _THOUGHTS]
    if not thoughts or message.get("reasoning_content") or message.get("reasoning"):
        return {}
    return {"reasoning_content": "\n".join(thoughts)}


def _system_content(content: str | list[Json]) -> str | list[Json]:
    """Returns a system message's content without the billing header, or the parts that hold nothing else."""
    if isinstance(content, str):
        return without_billing_header(content)
    parts = [{**part, "text": without_billing_header(part["text"])} for part in content]
    return [part for part, given in zip(parts, content, strict=True) if part["text"] or not given["text"]]


def _text_part(part: Json) -> Json:
    kind = part["type"]
    text = part.get("refusal" if kind == "refusal" else "text")
    return {"type": "text", "text": text if isinstance(text, str) else placeholder(kind)}


def _template_call(call: Json) -> Json:
    if custom := call.get("custom"):
        call = {
            "id": call.get("id"),
            "function": {**custom, "arguments": as_arguments(custom.get("input", ""))},
        }
        call["function"].pop("input", None)
    function = {**call["function"], "arguments": _arguments(call["function"].get("arguments"))}
    return {**call, "type": "function", "function": function}


def _arguments(given: Any) -> Json | str:
    """Returns a call's arguments: the object, parsed if it is JSON text; {} for blank or null; else the text."""
    if given is None or isinstance(given, dict):
        return given or {}
    text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    try:
        value = pydantic_core.from_json(text, allow_inf_nan=False) if text.strip() else None
    except ValueError:
        return text
    if value is None:
        return {}
    return value if isinstance(value, dict) else text
