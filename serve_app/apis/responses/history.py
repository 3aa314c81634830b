"""Validates the input items of OpenAI's /v1/responses and translates them to chat messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Required

from typing_extensions import TypedDict

from serve_app.apis.responses.tools import Tool, flat_name
from serve_app.apis.shared.body import ByTag, ByType, Filled, Json, Must, about
from serve_app.apis.shared.conversation import placeholder, without_billing_header
from serve_app.apis.shared.custom_tools import as_arguments


class _TextPart(TypedDict):
    type: Literal["input_text", "output_text", "text"]
    text: str


class _RefusalPart(TypedDict):
    type: Literal["refusal"]
    refusal: str


_Content = Annotated[
    str
    | Annotated[
        list[
            Annotated[
                _TextPart | _RefusalPart,
                ByTag("type", "a content part", ("input_image", "input_file", "input_audio")),
            ]
        ],
        Must("a list of text parts"),
    ],
    ByType("a string or a list of text parts"),
]
_Output = Annotated[
    str
    | Annotated[
        list[Annotated[_TextPart | _RefusalPart | Json, ByTag("type", "a part")]], Must("a list of parts")
    ],
    ByType("a string or a list of parts"),
    about("A part that is not text is replaced by a placeholder."),
]


class _Message(TypedDict, total=False):
    type: Literal["message"]
    role: Required[Literal["user", "assistant", "system", "developer"]]
    content: Required[_Content]


class _Text(TypedDict):
    text: str


class _Reasoning(TypedDict, total=False):
    type: Required[Literal["reasoning"]]
    content: Annotated[list[Annotated[_Text, Must("a text")]], Must("a list of reasoning texts")]
    summary: Annotated[list[Annotated[_Text, Must("a text")]], Must("a list of summary texts")]


class _FunctionCall(TypedDict, total=False):
    type: Required[Literal["function_call"]]
    call_id: str
    name: Required[Filled]
    namespace: str
    arguments: Annotated[Any, about("Arguments as JSON text; none if absent.")]


class _FunctionOutput(TypedDict, total=False):
    type: Required[Literal["function_call_output"]]
    call_id: str
    output: _Output


class _CustomCall(TypedDict, total=False):
    type: Required[Literal["custom_tool_call"]]
    call_id: str
    name: Required[Filled]
    namespace: str
    input: str


class _CustomOutput(TypedDict, total=False):
    type: Required[Literal["custom_tool_call_output"]]
    call_id: str
    output: _Output


class _ItemReference(TypedDict):
    type: Literal["item_reference"]
    id: Filled


class _McpCall(TypedDict, total=False):
    type: Required[Literal["mcp_call"]]
    name: Required[Filled]
    arguments: Any


class _AdditionalTools(TypedDict):
    type: Literal["additional_tools"]
    tools: Annotated[list[Tool], Must("a list of tools")]


class _DefinedCall(TypedDict):
    """A call of a tool in _DEFINED, or its result."""

    type: Literal[
        "local_shell_call", "shell_call", "apply_patch_call", "computer_call", "code_interpreter_call",
        "local_shell_call_output", "shell_call_output", "apply_patch_call_output", "computer_call_output",
    ]  # fmt: skip


class _IgnoredItem(TypedDict):
    """An item without text for the model, or whose content the message after it repeats."""

    type: Literal[
        "web_search_call", "file_search_call", "image_generation_call", "tool_search_call", "tool_search_output",
        "mcp_list_tools", "mcp_approval_request", "mcp_approval_response", "configuration_update",
        "compaction", "compaction_summary", "compaction_trigger", "context_compaction", "ghost_snapshot", "program",
        "program_output",
    ]  # fmt: skip


Item = Annotated[
    _Message | _Reasoning | _FunctionCall | _FunctionOutput | _CustomCall | _CustomOutput | _ItemReference
    | _McpCall | _AdditionalTools | _DefinedCall | _IgnoredItem,
    ByTag("type", "an input item", untagged="message", bare=_ItemReference, unless=("role", "content")),
]  # fmt: skip
# Tools that OpenAI defines, by item type: the name of the function, and the field with the arguments.
_DEFINED = {
    "local_shell_call": ("local_shell", "action"),
    "shell_call": ("shell", "action"),
    "apply_patch_call": ("apply_patch", "operation"),
    "computer_call": ("computer", "action"),
    "code_interpreter_call": ("code_interpreter", "code"),
}


def chat_conversation(instructions: str | None, items: Sequence[Mapping[str, Any]]) -> list[Json]:
    """Returns the chat messages of a prompt. `instructions` and the leading system messages are merged into one."""
    turns: list[Json] = []
    for item in items:
        _add_item(turns, item)
    texts = [instructions]
    while turns and turns[0]["role"] in ("system", "developer"):
        texts.append(turns.pop(0)["content"])
    leading = "\n\n".join(filter(None, (without_billing_header(text) for text in texts if text)))
    return [{"role": "system", "content": leading}, *turns] if leading else turns


def _add_item(turns: list[Json], item: Mapping[str, Any]) -> None:
    """Adds `item` to `turns`. Consecutive reasoning, text and calls of the assistant become one chat message."""
    kind = item.get("type", "message")
    if kind.endswith("_call_output"):
        turns.append(_tool_turn(item.get("call_id") or item.get("id"), item.get("output")))
    elif kind == "message" and item["role"] != "assistant":
        turns.append({"role": item["role"], "content": _text(item["content"])})
    elif kind == "message":
        _assistant_turn(turns, "content", "tool_calls")["content"] = _text(item["content"])
    elif kind == "reasoning":
        parts = item.get("content") or item.get("summary") or []
        if text := "\n".join(part["text"] for part in parts):  # encrypted reasoning has no text
            _assistant_turn(turns, "reasoning_content", "content", "tool_calls")["reasoning_content"] = text
    elif call := _call(item, kind):
        _assistant_turn(turns).setdefault("tool_calls", []).append(call)
        if kind in ("mcp_call", "code_interpreter_call"):
            result = item.get("output") or item.get("outputs") or item.get("error")
            turns.append(_tool_turn(call["id"], result))


def _assistant_turn(turns: list[Json], *later_fields: str) -> Json:
    """Returns the assistant message that ends `turns`, or appends one if it is absent or has any of `later_fields`."""
    last = turns[-1] if turns else {}
    if last.get("role") == "assistant" and not any(last.get(field) for field in later_fields):
        return last
    turns.append({"role": "assistant", "content": ""})
    return turns[-1]


def _call(item: Mapping[str, Any], kind: str) -> Json | None:
    """Returns chat's tool call for a call item, None for other items."""
    namespace = None
    if kind in _DEFINED:
        name, field = _DEFINED[kind]
        given = item.get(field)
        arguments: Any = {field: given} if isinstance(given, str) else given
    elif kind == "custom_tool_call":
        name, namespace, arguments = item["name"], item.get("namespace"), as_arguments(item.get("input", ""))
    elif kind == "function_call":
        name, namespace, arguments = item["name"], item.get("namespace"), item.get("arguments")
    elif kind == "mcp_call":
        name, arguments = item["name"], item.get("arguments")
    else:
        return None
    function = {"name": flat_name(name, namespace), "arguments": arguments}
    return {"id": item.get("call_id") or item.get("id"), "type": "function", "function": function}


def _tool_turn(call_id: Any, output: Any) -> Json:
    return {
        "role": "tool",
        "tool_call_id": call_id if isinstance(call_id, str) else None,
        "content": _text(output),
    }


def _text(content: Any) -> str:
    """Returns the joined text of parts, with a placeholder for a part without text."""
    if isinstance(content, list):
        return "".join(_text(part) for part in content)
    if not isinstance(content, dict):
        return content if isinstance(content, str) else ""
    texts = [content.get(name) for name in ("text", "refusal", "stdout", "stderr", "logs", "message")]
    shown = [text for text in texts if isinstance(text, str)]
    return "".join(shown) if shown else placeholder(str(content.get("type")))
