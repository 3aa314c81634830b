"""What a chat is made of: messages and tools, checked, and put as chat templates read them."""

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

# Roles of other clients, by what templates call them.
_ROLES = {"developer": "system", "function": "tool"}
# Claude Code puts this line into the system prompt. It changes with every request and would spoil the prefix cache.
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
_PartSaid = Annotated[
    _TextPart | _RefusalPart | _ThinkingPart | _ReasoningPart, ByTag("type", "a content part", _FILES)
]
_PartReturned = Annotated[_TextPart | _RefusalPart | Json, ByTag("type", "a content part")]
_Content = Annotated[
    str | Annotated[list[Annotated[str | _Part, ByType("a content part")]], Must("a list of text parts")],
    ByType("a string or a list of text parts"),
]
_Said = Annotated[
    str | Annotated[list[Annotated[str | _PartSaid, ByType("a content part")]], Must("a list of text parts")],
    ByType("a string or a list of text parts"),
]
_Result = Annotated[
    str | Annotated[list[Annotated[str | _PartReturned, ByType("a content part")]], Must("a list of parts")],
    ByType("a string or a list of parts"),
    about("What is no text becomes a word for it."),
]
Name = Annotated[
    str,
    Field(pattern="^[a-zA-Z0-9_.-]{1,128}$"),
    Must("a name of up to 128 letters, digits, dots, dashes and underscores"),
]


class _Called(TypedDict, total=False):
    name: Required[str]
    arguments: Annotated[Any, about("JSON text; absent, there are none.")]


_ACall = Annotated[_Called, Must("an object with name and arguments")]


class _FunctionCall(TypedDict, total=False):
    type: Literal["function"]
    id: str
    function: Required[_ACall]


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
    content: _Said
    refusal: Annotated[str, about("What it said in place of an answer.")]
    name: str
    reasoning_content: Annotated[str, about("What it thought before.")]
    reasoning: Annotated[str, about("The same under another name.")]
    tool_calls: _Calls
    function_call: Annotated[_ACall, about("A call, as older clients have it.")]


class _ToolMessage(TypedDict, total=False):
    role: Required[Literal["tool"]]
    content: _Result
    name: str
    tool_call_id: str


class _FunctionMessage(TypedDict, total=False):
    role: Required[Literal["function"]]
    content: _Result
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
    """Some of the tools, of which the model may or must call one."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[Json], Must("a list of tools"), about("Those of the tools that count.")]


class _ChosenAllowed(TypedDict):
    type: Literal["allowed_tools"]
    allowed_tools: Annotated[AllowedTools, Must("an object with mode and tools")]


ToolChoice = Annotated[
    Literal["none", "auto", "required"]
    | Annotated[_ChosenFunction | _ChosenCustom | _ChosenAllowed, ByTag("type", "an object with type")],
    ByType('one of "none", "auto", "required", or an object that names a tool'),
]


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[Json]:
    """`messages` as `template_message` puts them; system messages of which nothing is left are left out."""
    turns = [template_message(message) for message in messages]
    kept = [
        turn
        for turn, message in zip(turns, messages, strict=True)
        if turn["role"] != "system" or turn.get("content") or not message.get("content")
    ]
    return kept or turns


def without_billing(text: str) -> str:
    """A system text without the line that Claude Code puts into it."""
    kept = _BILLING.sub("", text)
    return text if kept == text else kept.strip("\r\n")


def template_message(message: Mapping[str, Any]) -> Json:
    """`message` in the words that Qwen3's templates know; arguments of calls as objects, where they are."""
    message = {**message, "role": _ROLES.get(message["role"], message["role"])}
    if isinstance(message.get("content"), list):
        parts = [{"type": "text", "text": p} if isinstance(p, str) else p for p in message["content"]]
        if message["role"] == "assistant":
            message |= _thoughts(message, parts)
            parts = [part for part in parts if part["type"] not in _THOUGHTS]
        message["content"] = [_text_part(part) for part in parts] or ""
    if message["role"] == "system":
        return {**message, "content": _instructions(message["content"])}
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


def stand_in(kind: str) -> str:
    """The text in place of something of a tool's result that is no text."""
    return f"[{kind} left out: the model reads text alone]"


def plain_content(message: Mapping[str, Any]) -> str:
    """The text of a message, its parts joined."""
    content = message.get("content", "")
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def template_tools(tools: Sequence[Mapping[str, Any]]) -> list[Json]:
    """Those of `tools` that a client runs, as functions; tools that OpenAI or others host are left out."""
    functions = []
    for tool in tools:
        if tool["type"] == "custom":
            functions.append({"type": "function", "function": as_function(tool["custom"])})
        elif tool["type"] == "function":
            functions.append({"type": "function", **tool})
    return functions


def _thoughts(message: Json, parts: list[Json]) -> Json:
    """The thoughts among the `parts` of an assistant's content, unless `message` has them beside it."""
    thoughts = [part.get("thinking") or part.get("text", "") for part in parts if part["type"] in _THOUGHTS]
    if not thoughts or message.get("reasoning_content") or message.get("reasoning"):
        return {}
    return {"reasoning_content": "\n".join(thoughts)}


def _instructions(content: str | list[Json]) -> str | list[Json]:
    """The content of a system message without billing lines, or parts that were nothing else."""
    if isinstance(content, str):
        return without_billing(content)
    parts = [{**part, "text": without_billing(part["text"])} for part in content]
    return [part for part, given in zip(parts, content, strict=True) if part["text"] or not given["text"]]


def _text_part(part: Json) -> Json:
    kind = part["type"]
    text = part.get("refusal" if kind == "refusal" else "text")
    return {"type": "text", "text": text if isinstance(text, str) else stand_in(kind)}


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
    """A call's arguments: the object that they are, in JSON or not; {} for blank or null; else their text."""
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
