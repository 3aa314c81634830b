"""Tools of OpenAI's /v1/responses in chat's words, and what their calls are called in the answer.

Custom tools and those of namespaces are functions to the model; what OpenAI runs is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qwen3_dist.errors import RequestError
from serve_app.apis.shared.custom_tools import as_function
from serve_app.apis.shared.kinds import (
    BOOL,
    FILLED_TEXT,
    OBJECT,
    TEXT,
    Either,
    Field,
    Json,
    ListOf,
    Record,
    Tagged,
    one_of,
    short,
)
from serve_app.apis.shared.older import ALLOWED_TOOLS, CUSTOM_FORMAT, NAME

_LONGEST_NAME = 128
_CLIENTS = {
    "function": Record(
        "",
        {
            "name": Field(NAME, required=True),
            "description": Field(TEXT),
            "parameters": Field(OBJECT, "JSON schema of the arguments"),
            "strict": Field(BOOL),
        },
    ),
    "custom": Record(
        "", {"name": Field(NAME, required=True), "description": Field(TEXT), "format": CUSTOM_FORMAT}
    ),
}
_IN_NAMESPACE = ListOf(Tagged("a tool", "type", _CLIENTS, {}, others=True), "a list of tools")
_NAMESPACE = Record(
    "",
    {
        "name": Field(FILLED_TEXT, required=True),
        "description": Field(TEXT, ignored="the tools in it have descriptions of their own."),
        "tools": Field(_IN_NAMESPACE, required=True),
    },
)
TOOL = Tagged("a tool", "type", {**_CLIENTS, "namespace": _NAMESPACE}, {}, others=True)
_NAMED = Record("", {"name": Field(FILLED_TEXT, required=True), "namespace": Field(TEXT)})
TOOL_CHOICE = Either(
    'one of "none", "auto", "required", or an object with type',
    (
        one_of("none", "auto", "required"),
        Tagged(
            "an object with type",
            "type",
            {"function": _NAMED, "custom": _NAMED, "allowed_tools": ALLOWED_TOOLS},
            {},
            others=True,
        ),
    ),
)


@dataclass(frozen=True)
class Called:
    """What a call's item is named in the answer, and whether it is one of a custom tool."""

    name: str
    namespace: str | None = None
    custom: bool = False


def flat_name(name: str, namespace: str | None) -> str:
    """What the model calls tool `name` of `namespace`."""
    if not namespace:
        return name
    flat = f"{namespace}{name}" if namespace.endswith("__") else f"{namespace}__{name}"
    return re.sub(r"[^a-zA-Z0-9_.-]", "_", flat)[:_LONGEST_NAME]


def called_tools(tools: list[Json]) -> dict[str, Called]:
    """By the name that the model knows a tool by, what its calls are in the answer."""
    return {
        flat_name(tool["name"], space): Called(tool["name"], space, tool["type"] == "custom")
        for tool, space in _client_tools(tools)
    }


def chat_tools(tools: list[Json]) -> list[Json]:
    """Chat's functions for those of `tools` that clients run."""
    functions = []
    for tool, space in _client_tools(tools):
        function = as_function(tool) if tool["type"] == "custom" else _without_type(tool)
        functions.append(
            {"type": "function", "function": {**function, "name": flat_name(tool["name"], space)}}
        )
    return functions


def chat_tool_choice(choice: str | Json | None, tools: list[Json]) -> Any:
    """Chat's tool_choice. Raises RequestError for a tool that OpenAI runs."""
    if not isinstance(choice, dict):
        return choice
    if choice["type"] == "allowed_tools":
        allowed = [_function(_chosen(tool, tools)) for tool in choice["tools"]]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice["mode"], "tools": allowed}}
    if choice["type"] not in _CLIENTS:
        raise RequestError(
            f"tool_choice.type={short(choice['type'])} is a tool that OpenAI runs; this service has none, so "
            "leave it out",
            param="tool_choice.type",
        )
    return _function(_chosen(choice, tools))


def _client_tools(tools: list[Json]) -> Iterator[tuple[Json, str | None]]:
    """Each tool that a client runs, with its namespace."""
    for tool in tools:
        if tool["type"] in _CLIENTS:
            yield tool, None
        elif tool["type"] == "namespace":
            yield from ((inner, tool["name"]) for inner in tool["tools"] if inner["type"] in _CLIENTS)


def _chosen(choice: Json, tools: list[Json]) -> str:
    """The name that the model knows the chosen tool by; its namespace may be left out."""
    name, known = str(choice.get("name")), called_tools(tools)
    flat = flat_name(name, choice.get("namespace"))
    if flat in known:
        return flat
    return next((flat for flat, called in known.items() if called.name == name), flat)


def _function(name: str) -> Json:
    return {"type": "function", "function": {"name": name}}


def _without_type(tool: Json) -> Json:
    return {name: value for name, value in tool.items() if name != "type"}
