"""Input items of OpenAI's /v1/responses, as its clients send them, in chat's words."""

from __future__ import annotations

from typing import Any

from serve_app.apis.responses.tools import TOOL, flat_name
from serve_app.apis.shared.conversation import stand_in, without_billing
from serve_app.apis.shared.custom_tools import as_arguments
from serve_app.apis.shared.kinds import (
    ANYTHING,
    FILLED_TEXT,
    TEXT,
    Either,
    Field,
    Json,
    ListOf,
    Record,
    Tagged,
    one_of,
)

_TEXT_PART = Record("", {"text": Field(TEXT, required=True)})
_PARTS = {
    **dict.fromkeys(("input_text", "output_text", "text"), _TEXT_PART),
    "refusal": Record("", {"refusal": Field(TEXT, required=True)}),
}
_NO_FILES = "is not supported: the model reads text alone"
_FILES = dict.fromkeys(("input_image", "input_file", "input_audio"), _NO_FILES)
_CONTENT = Either(
    "a string or a list of text parts",
    (TEXT, ListOf(Tagged("a content part", "type", _PARTS, _FILES), "a list of text parts")),
)
_OUTPUT = Either(
    "a string or a list of parts",
    (TEXT, ListOf(Tagged("a part", "type", _PARTS, {}, others=True), "a list of parts")),
)
_RETURNED = Record(
    "",
    {"call_id": Field(TEXT), "output": Field(_OUTPUT, "What is no text becomes a word for it.")},
)
# Tools that OpenAI defines: the name of a call of one, and the field that has its arguments.
_DEFINED = {
    "local_shell_call": ("local_shell", "action"),
    "shell_call": ("shell", "action"),
    "apply_patch_call": ("apply_patch", "operation"),
    "computer_call": ("computer", "action"),
    "code_interpreter_call": ("code_interpreter", "code"),
}
_RESULTS = ("local_shell_call_output", "shell_call_output", "apply_patch_call_output", "computer_call_output")
# Items that say nothing that a model could read, or nothing that the answer after them does not say.
_SILENT = (
    "web_search_call", "file_search_call", "image_generation_call", "tool_search_call", "tool_search_output",
    "mcp_list_tools", "mcp_approval_request", "mcp_approval_response", "configuration_update",
    "compaction", "compaction_summary", "compaction_trigger", "context_compaction", "ghost_snapshot", "program",
    "program_output",
)  # fmt: skip
_ANY = Record("", {})
ITEM = Tagged(
    "an input item",
    "type",
    {
        "message": Record(
            "",
            {
                "role": Field(one_of("user", "assistant", "system", "developer"), required=True),
                "content": Field(_CONTENT, required=True),
            },
        ),
        "reasoning": Record(
            "",
            {
                "content": Field(ListOf(_TEXT_PART, "a list of reasoning texts")),
                "summary": Field(ListOf(_TEXT_PART, "a list of summary texts")),
            },
        ),
        "function_call": Record(
            "",
            {
                "call_id": Field(TEXT),
                "name": Field(FILLED_TEXT, required=True),
                "namespace": Field(TEXT),
                "arguments": Field(ANYTHING, "JSON text; absent, there are none."),
            },
        ),
        "function_call_output": _RETURNED,
        "custom_tool_call": Record(
            "",
            {
                "call_id": Field(TEXT),
                "name": Field(FILLED_TEXT, required=True),
                "namespace": Field(TEXT),
                "input": Field(TEXT),
            },
        ),
        "custom_tool_call_output": _RETURNED,
        "item_reference": Record("", {"id": Field(FILLED_TEXT, required=True)}),
        "mcp_call": Record("", {"name": Field(FILLED_TEXT, required=True), "arguments": Field(ANYTHING)}),
        "additional_tools": Record("", {"tools": Field(ListOf(TOOL, "a list of tools"), required=True)}),
        **dict.fromkeys((*_DEFINED, *_RESULTS, *_SILENT), _ANY),
    },
    {},
    untagged="message",
    bare="item_reference",
)


def chat_conversation(instructions: str | None, items: list[Json]) -> list[Json]:
    """The chat messages of a prompt; `instructions` and the system messages that follow them are one."""
    turns: list[Json] = []
    for item in items:
        _add_item(turns, item)
    texts = [instructions]
    while turns and turns[0]["role"] in ("system", "developer"):
        texts.append(turns.pop(0)["content"])
    leading = "\n\n".join(filter(None, (without_billing(text) for text in texts if text)))
    return [{"role": "system", "content": leading}, *turns] if leading else turns


def _add_item(turns: list[Json], item: Json) -> None:
    """Adds `item`; what one turn of the assistant had of reasoning, text and calls is one chat message."""
    kind = item.get("type", "message")
    if kind.endswith("_call_output"):
        turns.append(_tool_turn(item.get("call_id") or item.get("id"), item.get("output")))
    elif kind == "message" and item["role"] != "assistant":
        turns.append({"role": item["role"], "content": _text(item["content"])})
    elif kind == "message":
        _turn(turns, "content", "tool_calls")["content"] = _text(item["content"])
    elif kind == "reasoning":
        parts = item.get("content") or item.get("summary") or []
        if text := "\n".join(part["text"] for part in parts):  # encrypted, it is nothing that can be read
            _turn(turns, "reasoning_content", "content", "tool_calls")["reasoning_content"] = text
    elif call := _call(item, kind):
        _turn(turns).setdefault("tool_calls", []).append(call)
        if kind in ("mcp_call", "code_interpreter_call"):
            result = item.get("output") or item.get("outputs") or item.get("error")
            turns.append(_tool_turn(call["id"], result))


def _turn(turns: list[Json], *taken: str) -> Json:
    """The assistant's message under way, or a new one if one of the parts `taken` is there already."""
    last = turns[-1] if turns else {}
    if last.get("role") == "assistant" and not any(last.get(part) for part in taken):
        return last
    turns.append({"role": "assistant", "content": ""})
    return turns[-1]


def _call(item: Json, kind: str) -> Json | None:
    """Chat's call for an item that is one."""
    space = None
    if kind in _DEFINED:
        name, field = _DEFINED[kind]
        given = item.get(field)
        arguments: Any = {field: given} if isinstance(given, str) else given
    elif kind == "custom_tool_call":
        name, space, arguments = item["name"], item.get("namespace"), as_arguments(item.get("input", ""))
    elif kind == "function_call":
        name, space, arguments = item["name"], item.get("namespace"), item.get("arguments")
    elif kind == "mcp_call":
        name, arguments = item["name"], item.get("arguments")
    else:
        return None
    function = {"name": flat_name(name, space), "arguments": arguments}
    return {"id": item.get("call_id") or item.get("id"), "type": "function", "function": function}


def _tool_turn(call_id: Any, output: Any) -> Json:
    return {
        "role": "tool",
        "tool_call_id": call_id if isinstance(call_id, str) else None,
        "content": _text(output),
    }


def _text(content: Any) -> str:
    """The text of parts, joined; a word in place of a part that has none."""
    if isinstance(content, list):
        return "".join(_text(part) for part in content)
    if not isinstance(content, dict):
        return content if isinstance(content, str) else ""
    texts = [content.get(name) for name in ("text", "refusal", "stdout", "stderr", "logs", "message")]
    shown = [text for text in texts if isinstance(text, str)]
    return "".join(shown) if shown else stand_in(str(content.get("type")))
