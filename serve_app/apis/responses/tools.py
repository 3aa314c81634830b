"""Tools of /v1/responses: their translation to chat's functions, and the names of their calls in the response.

The model sees custom tools and tools of namespaces as functions. Tools that OpenAI runs are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Required

from typing_extensions import TypedDict

from qwen3_dist.errors import RequestError
from serve_app.apis.shared.body import ByTag, ByType, Filled, Json, Must, about, ignored
from serve_app.apis.shared.conversation import AllowedTools, Name
from serve_app.apis.shared.custom_tools import CustomFormat, as_function
from serve_app.apis.shared.validation_errors import short

_MAX_NAME_LENGTH = 128
_CLIENT_TYPES = ("function", "custom")


class _Function(TypedDict, total=False):
    type: Required[Literal["function"]]
    name: Required[Name]
    description: str
    parameters: Annotated[Json, about("JSON schema of the arguments")]
    strict: bool


class _Custom(TypedDict, total=False):
    type: Required[Literal["custom"]]
    name: Required[Name]
    description: str
    format: CustomFormat


class _Namespace(TypedDict, total=False):
    type: Required[Literal["namespace"]]
    name: Required[Filled]
    description: Annotated[str, ignored("its tools have descriptions of their own.")]
    tools: Required[
        Annotated[
            list[Annotated[_Function | _Custom | Json, ByTag("type", "a tool")]], Must("a list of tools")
        ]
    ]


class _Chosen(TypedDict, total=False):
    type: Required[Literal["function", "custom"]]
    name: Required[Filled]
    namespace: str


class _ChosenAllowed(AllowedTools):
    type: Literal["allowed_tools"]


Tool = Annotated[_Function | _Custom | _Namespace | Json, ByTag("type", "a tool")]
ToolChoice = Annotated[
    Literal["none", "auto", "required"]
    | Annotated[_Chosen | _ChosenAllowed | Json, ByTag("type", "an object with type")],
    ByType('one of "none", "auto", "required", or an object with type'),
]
Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class CalledTool:
    """The name and namespace of a tool in the response, and whether it is a custom tool."""

    name: str
    namespace: str | None = None
    custom: bool = False


def flat_name(name: str, namespace: str | None) -> str:
    """Returns the name that the model sees for tool `name` of `namespace`."""
    if not namespace:
        return name
    flat = f"{namespace}{name}" if namespace.endswith("__") else f"{namespace}__{name}"
    return re.sub(r"[^a-zA-Z0-9_.-]", "_", flat)[:_MAX_NAME_LENGTH]


def called_tools(tools: Tools) -> dict[str, CalledTool]:
    """Returns the tools that the client runs, by the name that the model sees."""
    return {
        flat_name(tool["name"], space): CalledTool(tool["name"], space, tool["type"] == "custom")
        for tool, space in _client_tools(tools)
    }


def chat_tools(tools: Tools) -> list[Json]:
    """Returns chat's functions for the tools that the client runs."""
    functions = []
    for tool, space in _client_tools(tools):
        function = as_function(tool) if tool["type"] == "custom" else _without_type(tool)
        functions.append(
            {"type": "function", "function": {**function, "name": flat_name(tool["name"], space)}}
        )
    return functions


def chat_tool_choice(choice: str | Mapping[str, Any] | None, tools: Tools) -> Any:
    """Returns chat's tool_choice. Raises RequestError for a tool that OpenAI runs."""
    if choice is None or isinstance(choice, str):
        return choice
    if choice["type"] == "allowed_tools":
        allowed = [_function(_chosen(tool, tools)) for tool in choice["tools"]]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice["mode"], "tools": allowed}}
    if choice["type"] not in _CLIENT_TYPES:
        raise RequestError(
            f"tool_choice.type={short(choice['type'])} is a tool that OpenAI runs, which this service cannot; "
            "leave it out",
            param="tool_choice.type",
        )
    return _function(_chosen(choice, tools))


def _client_tools(tools: Tools) -> Iterator[tuple[Mapping[str, Any], str | None]]:
    """Yields each tool that the client runs, with its namespace."""
    for tool in tools:
        if tool["type"] in _CLIENT_TYPES:
            yield tool, None
        elif tool["type"] == "namespace":
            yield from ((inner, tool["name"]) for inner in tool["tools"] if inner["type"] in _CLIENT_TYPES)


def _chosen(choice: Mapping[str, Any], tools: Tools) -> str:
    """Returns the name that the model sees for the chosen tool, whose namespace may be missing in `choice`."""
    name, known = str(choice.get("name")), called_tools(tools)
    flat = flat_name(name, choice.get("namespace"))
    if flat in known:
        return flat
    return next((flat for flat, called in known.items() if called.name == name), flat)


def _function(name: str) -> Json:
    return {"type": "function", "function": {"name": name}}


def _without_type(tool: Mapping[str, Any]) -> Json:
    return {name: value for name, value in tool.items() if name != "type"}
