"""Tools that Anthropic defines and clients run. Clients send them without schemas, so the schemas are here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from serve_app.apis.shared.body import Json

_PATH = {"type": "string", "description": "Absolute path of a file or directory."}
_LINES = {
    "type": "array",
    "items": {"type": "integer"},
    "description": "First and last line to view, from 1; -1 is the end.",
}
_EDITS: dict[str, Any] = {
    "path": _PATH,
    "file_text": {"type": "string", "description": "For create: the whole text of the file."},
    "old_str": {"type": "string", "description": "For str_replace: the text to replace, which occurs once."},
    "new_str": {"type": "string", "description": "For str_replace: the text in its place."},
    "insert_line": {"type": "integer", "description": "For insert: the line after which the text goes."},
    "view_range": _LINES,
}


def _schema(required: list[str], properties: dict[str, Any], *commands: str) -> Json:
    command = {"command": {"type": "string", "enum": list(commands)}} if commands else {}
    return {"type": "object", "properties": {**command, **properties}, "required": required}


# Descriptions and schemas by the prefix of the tool's type, which a date follows.
_KNOWN: dict[str, tuple[str, Json]] = {
    "bash_": (
        "Runs a command in a shell that stays open between calls.",
        _schema(
            [],
            {
                "command": {"type": "string", "description": "The command to run."},
                "restart": {"type": "boolean", "description": "Starts the shell anew."},
            },
        ),
    ),
    "text_editor_": (
        "Views, creates and edits text files.",
        _schema(
            ["command", "path"],
            {**_EDITS, "insert_text": {"type": "string", "description": "For insert: the text."}},
            "view", "create", "str_replace", "insert",
        ),
    ),
    "memory_": (
        "Keeps notes in files under /memories that outlast the conversation.",
        _schema(
            ["command"],
            {
                **_EDITS,
                "insert_text": {"type": "string", "description": "For insert: the text."},
                "old_path": {"type": "string", "description": "For rename."},
                "new_path": {"type": "string", "description": "For rename."},
            },
            "view", "create", "str_replace", "insert", "delete", "rename",
        ),
    ),
}  # fmt: skip


def client_tools(tools: Sequence[Mapping[str, Any]]) -> list[Json]:
    """Returns chat's functions for the tools that Anthropic defines and clients run."""
    functions = []
    for tool in tools:
        for prefix, (description, schema) in _KNOWN.items():
            if tool.get("type", "").startswith(prefix) and isinstance(tool.get("name"), str):
                function = {"name": tool["name"], "description": description, "parameters": schema}
                functions.append({"type": "function", "function": function})
    return functions
