"""What a chat is made of: messages and tools, checked, and put as chat templates read them."""

from __future__ import annotations

import json
import re
from typing import Any

import pydantic_core

from serve_app.apis.shared.custom_tools import CUSTOM_CALL, CUSTOM_FORMAT, as_arguments, as_function
from serve_app.apis.shared.kinds import (
    ANYTHING,
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

# Roles of other clients, by what templates call them.
_ROLES = {"developer": "system", "function": "tool"}
# Claude Code puts this line into the system prompt. It changes with every request and would spoil the prefix cache.
_BILLING = re.compile(
    r"^[ \t]*x-anthropic-billing-header:(?:(?:[ \t]*[\w.-]+=[^;\s]*(?:;|(?=\s|$)))+|[^\n]*)[ \t]*(?:\r?\n|$)?",
    re.MULTILINE,
)
_NO_FILES = "is not supported: the model reads text alone"
_FILES = ("image_url", "input_audio", "audio_url", "video_url", "file")
_TEXT_PART = Record("a text part", {"text": Field(TEXT, required=True)})
_PARTS = {
    "text": _TEXT_PART,
    "input_text": _TEXT_PART,
    "output_text": _TEXT_PART,
    "refusal": Record("a refusal part", {"refusal": Field(TEXT, required=True)}),
}
_THOUGHTS = {
    "thinking": Record("", {"thinking": Field(TEXT, required=True)}),
    "reasoning": Record("", {"text": Field(TEXT, required=True)}),
}


def _text_or(part: Tagged, words: str) -> Either:
    """Content: a string, or a list of parts and strings."""
    return Either(f"a string or {words}", (TEXT, ListOf(Either(part.words, (TEXT, part)), words)))


_REFUSED = dict.fromkeys(_FILES, _NO_FILES)
_CONTENT = _text_or(Tagged("a content part", "type", _PARTS, _REFUSED), "a list of text parts")
_SAID_BEFORE = _text_or(
    Tagged("a content part", "type", {**_PARTS, **_THOUGHTS}, _REFUSED), "a list of text parts"
)
_RESULT = _text_or(Tagged("a content part", "type", _PARTS, {}, others=True), "a list of parts")
_NAME_PATTERN = r"[a-zA-Z0-9_.-]{1,128}"
NAME = Plain(
    "a name of up to 128 letters, digits, dots, dashes and underscores",
    {"type": "string", "pattern": f"^{_NAME_PATTERN}$"},
    lambda value: re.fullmatch(_NAME_PATTERN, value) is not None,
)
_CALLED = Record(
    "an object with name and arguments",
    {"name": Field(TEXT, required=True), "arguments": Field(ANYTHING, "JSON text; absent, there are none.")},
)
_CALL = Tagged(
    "an object with id, type and function",
    "type",
    {
        "function": Record("", {"id": Field(TEXT), "function": Field(_CALLED, required=True)}),
        "custom": Record("", {"id": Field(TEXT), "custom": Field(CUSTOM_CALL, required=True)}),
    },
    {},
    untagged="function",
)
_SAID = {"content": Field(_CONTENT, required=True), "name": Field(TEXT)}
_RETURNED = {"content": Field(_RESULT, "What is no text becomes a word for it."), "name": Field(TEXT)}
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
                "content": Field(_SAID_BEFORE),
                "refusal": Field(TEXT, "What it said in place of an answer."),
                "name": Field(TEXT),
                "reasoning_content": Field(TEXT, "What it thought before."),
                "reasoning": Field(TEXT, "The same under another name."),
                "tool_calls": Field(ListOf(_CALL, "a list of tool calls")),
                "function_call": Field(_CALLED, "A call, as older clients have it."),
            },
        ),
        "tool": Record("a message", {**_RETURNED, "tool_call_id": Field(TEXT)}),
        "function": Record("the result of a function_call", _RETURNED),
    },
    {},
)
MESSAGES = ListOf(_MESSAGE, "a list of at least one message", least=1)
_FUNCTION_TOOL = Record(
    "an object with name and parameters",
    {
        "name": Field(NAME, required=True),
        "description": Field(TEXT),
        "parameters": Field(OBJECT, "JSON schema of the arguments."),
        "strict": Field(BOOL),
    },
)
_CUSTOM_TOOL = Record(
    "an object with name",
    {"name": Field(NAME, required=True), "description": Field(TEXT), "format": CUSTOM_FORMAT},
)
_TOOL = Tagged(
    "an object with type and function",
    "type",
    {
        "function": Record("", {"function": Field(_FUNCTION_TOOL, required=True)}),
        "custom": Record("", {"custom": Field(_CUSTOM_TOOL, required=True)}),
    },
    {},
    untagged="function",
    others=True,
)
TOOLS = ListOf(_TOOL, "a list of tools")
_NAMED = Field(Record("an object with name", {"name": Field(TEXT, required=True)}), required=True)
ALLOWED_TOOLS = Record(
    "an object with mode and tools",
    {
        "mode": Field(one_of("auto", "required"), required=True),
        "tools": Field(ListOf(OBJECT, "a list of tools"), "Those of the tools that count.", required=True),
    },
)
TOOL_CHOICE = Either(
    'one of "none", "auto", "required", or an object that names a tool',
    (
        one_of("none", "auto", "required"),
        Tagged(
            "an object with type",
            "type",
            {
                "function": Record("", {"function": _NAMED}),
                "custom": Record("", {"custom": _NAMED}),
                "allowed_tools": Record("", {"allowed_tools": Field(ALLOWED_TOOLS, required=True)}),
            },
            {},
        ),
    ),
)


def template_messages(messages: list[Json]) -> list[Json]:
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


def template_message(message: Json) -> Json:
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


def plain_content(message: Json) -> str:
    """The text of a message, its parts joined."""
    content = message.get("content", "")
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def template_tools(tools: list[Json]) -> list[Json]:
    """Those of `tools` that a client runs, as functions; tools that OpenAI or others host are left out."""
    functions = []
    for tool in tools:
        kind = tool.get("type", "function")
        if kind == "custom":
            functions.append({"type": "function", "function": as_function(tool["custom"])})
        elif kind == "function":
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
