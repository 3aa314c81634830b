"""Conversations of Anthropic's /v1/messages, as its clients send them, in chat's words."""

from __future__ import annotations

from typing import Any

from serve_app.apis.shared.conversation import plain_content, stand_in, without_billing
from serve_app.apis.shared.kinds import (
    ANYTHING,
    BOOL,
    FILLED_TEXT,
    TEXT,
    Either,
    Field,
    Json,
    ListOf,
    Record,
    Tagged,
)

_NO_FILES = "is not supported: the model reads text alone"
_REFUSED_BLOCKS = dict.fromkeys(("image", "container_upload"), _NO_FILES)
_TEXT_BLOCK = Record("a text block", {"text": Field(TEXT, required=True)})


def _text_or_blocks(
    records: dict[str, Record], words: str, refused: dict[str, str], others: bool = False
) -> Either:
    block = Tagged("a content block", "type", records, refused, others=others)
    return Either(f"a string or a list of {words}", (TEXT, ListOf(block, f"a list of {words}")))


TEXTS = _text_or_blocks({"text": _TEXT_BLOCK}, "text blocks", {**_REFUSED_BLOCKS, "document": _NO_FILES})
_RESULT = _text_or_blocks({"text": _TEXT_BLOCK}, "content blocks", {}, others=True)
_SOURCE = Tagged(
    "an object with type",
    "type",
    {
        "text": Record("", {"data": Field(TEXT, required=True)}),
        "content": Record("", {"content": Field(TEXTS, required=True)}),
    },
    dict.fromkeys(("base64", "url", "file"), _NO_FILES),
)
_UNSIGNED = "thoughts are not signed here."
_CALL = {
    "id": Field(TEXT, required=True),
    "name": Field(FILLED_TEXT, required=True),
    "input": Field(ANYTHING),
}
_BLOCKS = {
    "text": _TEXT_BLOCK,
    "thinking": Record(
        "", {"thinking": Field(TEXT, required=True), "signature": Field(TEXT, ignored=_UNSIGNED)}
    ),
    "redacted_thinking": Record("", {}),
    "tool_use": Record("", _CALL),
}
_USER = _text_or_blocks(
    {
        "text": _TEXT_BLOCK,
        # What only an assistant says tells nothing here.
        **dict.fromkeys(("thinking", "redacted_thinking", "tool_use"), Record("", {})),
        "document": Record("", {"title": Field(TEXT), "source": Field(_SOURCE, required=True)}),
        "search_result": Record("", {"title": Field(TEXT), "source": Field(TEXT), "content": Field(TEXTS)}),
        "tool_result": Record(
            "",
            {
                "tool_use_id": Field(TEXT, required=True),
                "content": Field(_RESULT, "What is no text becomes a word for it."),
                "is_error": Field(BOOL),
            },
        ),
    },
    "content blocks",
    _REFUSED_BLOCKS,
)
_ASSISTANT = _text_or_blocks(
    {**_BLOCKS, "server_tool_use": Record("", _CALL), "mcp_tool_use": Record("", _CALL)},
    "content blocks",
    {},
    others=True,
)
_CALLS = ("tool_use", "server_tool_use", "mcp_tool_use")
MESSAGE = Tagged(
    "an object with role and content",
    "role",
    {
        "user": Record("a message", {"content": Field(_USER, required=True)}),
        "assistant": Record("a message", {"content": Field(_ASSISTANT, required=True)}),
        "system": Record("a message", {"content": Field(TEXTS, required=True)}),
    },
    {},
)
# The fields of a block that say something to a model, in the order in which it reads them.
_TOLD = (
    "title",
    "url",
    "source",
    "text",
    "data",
    "stdout",
    "stderr",
    "error_code",
    "tool_references",
    "content",
)


def chat_conversation(system: str | list[Json], messages: list[Json]) -> list[Json]:
    """The chat messages of a prompt; `system` and the system messages that follow it are one."""
    texts = [_system(system)]
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    texts += [_system(message["content"]) for message in messages[:first]]
    chat = [turn for message in messages[first:] for turn in _turns(message)]
    leading = "\n\n".join(filter(None, texts))
    return [{"role": "system", "content": leading}, *chat] if leading else chat


def silent_user(messages: list[Json]) -> int | None:
    """The index of the first user message that gives a model nothing to read; None if there is none."""
    silent = (i for i, message in enumerate(messages) if message["role"] == "user" and not _is_said(message))
    return next(silent, None)


def _is_said(message: Json) -> bool:
    turns = _turns(message)
    return any(turn["role"] == "tool" or plain_content(turn) for turn in turns)


def _turns(message: Json) -> list[Json]:
    """The chat messages that `message` stands for: each tool's result is one of its own."""
    role, content = message["role"], message["content"]
    if role == "system":
        return [{"role": role, "content": _system(content)}]
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    return _assistant_turns(content) if role == "assistant" else _user_turns(content)


def _user_turns(blocks: list[Json]) -> list[Json]:
    turns: list[Json] = []
    for block in blocks:
        if block["type"] == "tool_result":
            turns.append(_tool_turn(block))
        elif block["type"] in ("text", "document", "search_result"):
            if not turns or turns[-1]["role"] != "user":
                turns.append({"role": "user", "content": []})
            turns[-1]["content"].append({"type": "text", "text": _shown(block)})
    return turns


def _assistant_turns(blocks: list[Json]) -> list[Json]:
    """What the assistant said up to each result of a tool that Anthropic ran, and those results."""
    turns: list[Json] = []
    said: list[Json] = []
    for block in blocks:
        if block["type"].endswith("tool_result"):
            turns += [_assistant_turn(said)] if said else []
            turns.append(_tool_turn(block))
            said = []
        else:
            said.append(block)
    return turns if turns and not said else [*turns, _assistant_turn(said)]


def _assistant_turn(blocks: list[Json]) -> Json:
    thinking = [block["thinking"] for block in blocks if block["type"] == "thinking"]
    calls = [_chat_call(block) for block in blocks if block["type"] in _CALLS]
    # A compaction is a summary of turns that were dropped.
    texts = [_shown(block) for block in blocks if block["type"] in ("text", "compaction")]
    return {
        "role": "assistant",
        "content": "".join(texts),
        **({"reasoning_content": "\n".join(thinking)} if thinking else {}),
        **({"tool_calls": calls} if calls else {}),
    }


def _chat_call(block: Json) -> Json:
    function = {"name": block["name"], "arguments": block.get("input")}
    return {"id": block["id"], "type": "function", "function": function}


def _tool_turn(block: Json) -> Json:
    text = _shown(block["content"]) if block.get("content") else ""
    text = f"Error: {text}" if block.get("is_error") else text
    return {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text}


def _system(system: str | list[Json]) -> str:
    texts = [system] if isinstance(system, str) else [block["text"] for block in system]
    return "\n\n".join(filter(None, map(without_billing, texts)))


def _shown(value: Any) -> str:
    """The text of a block, of what it holds or of a list of either; a word in place of what is no text."""
    if isinstance(value, list):
        return "\n".join(filter(None, map(_shown, value)))
    if not isinstance(value, dict):
        return value if isinstance(value, str) else ""
    kind = str(value.get("type"))
    if kind == "tool_reference":
        return f"[tool {value.get('tool_name')}]"
    if kind == "image" or _is_file(value.get("source")):
        title = value.get("title")
        return "\n".join(filter(None, (title if isinstance(title, str) else None, stand_in(kind))))
    told = "\n".join(filter(None, (_shown(value.get(name)) for name in _TOLD)))
    return told if told or "text" in value else f"[{kind}]"


def _is_file(source: Any) -> bool:
    return isinstance(source, dict) and source.get("type") not in ("text", "content")
