"""Validates the messages of Anthropic's /v1/messages and translates them to chat messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Required

from typing_extensions import TypedDict

from serve_app.apis.shared.body import ByTag, ByType, Filled, Json, Must, about, ignored
from serve_app.apis.shared.conversation import placeholder, plain_content, without_billing_header

Blocks = Sequence[Mapping[str, Any]]
_FILES = ("image", "container_upload")


class _TextBlock(TypedDict):
    type: Literal["text"]
    text: str


class _ThinkingBlock(TypedDict, total=False):
    type: Required[Literal["thinking"]]
    thinking: Required[str]
    signature: Annotated[str, ignored("thinking is not signed.")]


class _RedactedBlock(TypedDict):
    type: Literal["redacted_thinking"]


class _CallBlock(TypedDict, total=False):
    type: Required[Literal["tool_use", "server_tool_use", "mcp_tool_use"]]
    id: Required[str]
    name: Required[Filled]
    input: Any


class _AssistantOnlyBlock(TypedDict):
    """A block that only assistant messages have. It is ignored in a user message."""

    type: Literal["thinking", "redacted_thinking", "tool_use"]


TextContent = Annotated[
    str
    | Annotated[
        list[Annotated[_TextBlock, ByTag("type", "a content block", (*_FILES, "document"))]],
        Must("a list of text blocks"),
    ],
    ByType("a string or a list of text blocks"),
]


class _TextSource(TypedDict):
    type: Literal["text"]
    data: str


class _ContentSource(TypedDict):
    type: Literal["content"]
    content: TextContent


class _DocumentBlock(TypedDict, total=False):
    type: Required[Literal["document"]]
    title: str
    source: Required[
        Annotated[
            _TextSource | _ContentSource, ByTag("type", "an object with type", ("base64", "url", "file"))
        ]
    ]


class _SearchResultBlock(TypedDict, total=False):
    type: Required[Literal["search_result"]]
    title: str
    source: str
    content: TextContent


class _ToolResultBlock(TypedDict, total=False):
    type: Required[Literal["tool_result"]]
    tool_use_id: Required[str]
    content: Annotated[
        str
        | Annotated[
            list[Annotated[_TextBlock | Json, ByTag("type", "a content block")]],
            Must("a list of content blocks"),
        ],
        ByType("a string or a list of content blocks"),
        about("A block that is not text is replaced by a placeholder."),
    ]
    is_error: bool


_UserBlock = Annotated[
    _TextBlock | _AssistantOnlyBlock | _DocumentBlock | _SearchResultBlock | _ToolResultBlock,
    ByTag("type", "a content block", _FILES),
]
_AssistantBlock = Annotated[
    _TextBlock | _ThinkingBlock | _RedactedBlock | _CallBlock | Json, ByTag("type", "a content block")
]


class _UserMessage(TypedDict):
    role: Literal["user"]
    content: Annotated[
        str | Annotated[list[_UserBlock], Must("a list of content blocks")],
        ByType("a string or a list of content blocks"),
    ]


class _AssistantMessage(TypedDict):
    role: Literal["assistant"]
    content: Annotated[
        str | Annotated[list[_AssistantBlock], Must("a list of content blocks")],
        ByType("a string or a list of content blocks"),
    ]


class _SystemMessage(TypedDict):
    role: Literal["system"]
    content: TextContent


Message = Annotated[
    _UserMessage | _AssistantMessage | _SystemMessage, ByTag("role", "an object with role and content")
]
_CALLS = ("tool_use", "server_tool_use", "mcp_tool_use")
# The fields of a block that hold text for the model, in the order in which they are joined.
_TEXT_FIELDS = (
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


def chat_conversation(system: str | Blocks, messages: Sequence[Mapping[str, Any]]) -> list[Json]:
    """Returns the chat messages of a prompt. `system` and the leading system messages are merged into one."""
    texts = [_system(system)]
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    texts += [_system(message["content"]) for message in messages[:first]]
    chat = [turn for message in messages[first:] for turn in _turns(message)]
    leading = "\n\n".join(filter(None, texts))
    return [{"role": "system", "content": leading}, *chat] if leading else chat


def first_empty_user_message(messages: Sequence[Mapping[str, Any]]) -> int | None:
    """Returns the index of the first user message without any text for the model, or None."""
    empty = (i for i, message in enumerate(messages) if message["role"] == "user" and not _has_text(message))
    return next(empty, None)


def _has_text(message: Mapping[str, Any]) -> bool:
    turns = _turns(message)
    return any(turn["role"] == "tool" or plain_content(turn) for turn in turns)


def _turns(message: Mapping[str, Any]) -> list[Json]:
    """Returns the chat messages for `message`; each tool result becomes a message of its own."""
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
            turns[-1]["content"].append({"type": "text", "text": _block_text(block)})
    return turns


def _assistant_turns(blocks: list[Json]) -> list[Json]:
    """Returns the chat messages: a tool message for each result of a tool that Anthropic ran, and the rest between."""
    turns: list[Json] = []
    pending: list[Json] = []
    for block in blocks:
        if block["type"].endswith("tool_result"):
            turns += [_assistant_turn(pending)] if pending else []
            turns.append(_tool_turn(block))
            pending = []
        else:
            pending.append(block)
    return turns if turns and not pending else [*turns, _assistant_turn(pending)]


def _assistant_turn(blocks: list[Json]) -> Json:
    thinking = [block["thinking"] for block in blocks if block["type"] == "thinking"]
    calls = [_chat_call(block) for block in blocks if block["type"] in _CALLS]
    # A compaction block summarizes messages that the client dropped.
    texts = [_block_text(block) for block in blocks if block["type"] in ("text", "compaction")]
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
    text = _block_text(block["content"]) if block.get("content") else ""
    text = f"Error: {text}" if block.get("is_error") else text
    return {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text}


def _system(system: str | Blocks) -> str:
    texts = [system] if isinstance(system, str) else [block["text"] for block in system]
    return "\n\n".join(filter(None, map(without_billing_header, texts)))


def _block_text(value: Any) -> str:
    """Returns the text of a block, of a field of one or of a list of blocks, with placeholders for files."""
    if isinstance(value, list):
        return "\n".join(filter(None, map(_block_text, value)))
    if not isinstance(value, dict):
        return value if isinstance(value, str) else ""
    kind = str(value.get("type"))
    if kind == "tool_reference":
        return f"[tool {value.get('tool_name')}]"
    if kind == "image" or _is_file(value.get("source")):
        title = value.get("title")
        return "\n".join(filter(None, (title if isinstance(title, str) else None, placeholder(kind))))
    text = "\n".join(filter(None, (_block_text(value.get(name)) for name in _TEXT_FIELDS)))
    return text if text or "text" in value else f"[{kind}]"


def _is_file(source: Any) -> bool:
    return isinstance(source, dict) and source.get("type") not in ("text", "content")
