"""Bodies of Anthropic's /v1/messages and /v1/messages/count_tokens, translated into chat's words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen3_dist.sampling_params import SamplingParams
from serve_app.answers.base import Answer, Served
from serve_app.answers.messages import MessageAnswer, message_error, message_error_event
from serve_app.protocol.chat import ChatRequest, chat_fields
from serve_app.protocol.conversation import NAME
from serve_app.protocol.generation import GENERATION
from serve_app.protocol.kinds import (
    BOOL,
    FILLED_TEXT,
    OBJECT,
    TEXT,
    Either,
    Field,
    Json,
    ListOf,
    Plain,
    Record,
    Tagged,
    integer,
    number,
    one_of,
)
from serve_app.protocol.prompts import Texts
from serve_app.protocol.sampling import SAMPLING, STOP_STRINGS
from serve_app.protocol.tokens import TextRequest

# Claude Code's first system block; it changes with every request, and would spoil the prefix cache.
_BILLING = "x-anthropic-billing-header"
_TEXT_BLOCK = Record("a text block", {"text": Field(TEXT, required=True)})
_NO_FILES = "is not supported: the model reads text alone"
_REFUSED_BLOCKS = {kind: _NO_FILES for kind in ("image", "document", "search_result", "container_upload")}


def _text_or_blocks(records: dict[str, Record], words: str) -> Either:
    block = Tagged("a content block", "type", records, _REFUSED_BLOCKS)
    return Either(f"a string or a list of {words}", (TEXT, ListOf(block, f"a list of {words}")))


_TEXTS = _text_or_blocks({"text": _TEXT_BLOCK}, "text blocks")
_CONTENT = _text_or_blocks(
    {
        "text": _TEXT_BLOCK,
        "thinking": Record("", {"thinking": Field(TEXT, required=True), "signature": Field(TEXT)}),
        "redacted_thinking": Record("", {}),
        "tool_use": Record(
            "",
            {
                "id": Field(TEXT, required=True),
                "name": Field(FILLED_TEXT, required=True),
                "input": Field(OBJECT, required=True),
            },
        ),
        "tool_result": Record(
            "",
            {
                "tool_use_id": Field(TEXT, required=True),
                "content": Field(_TEXTS),
                "is_error": Field(BOOL),
            },
        ),
    },
    "content blocks",
)
_MESSAGE = Record(
    "an object with role and content",
    {
        "role": Field(one_of("user", "assistant", "system"), required=True),
        "content": Field(_CONTENT, required=True),
    },
)
_CUSTOM = Plain(
    '"custom": tools that Anthropic runs or defines are not built',
    {"type": "string", "const": "custom"},
    "custom".__eq__,
)
_TOOL = Record(
    "an object with name and input_schema",
    {
        "type": Field(_CUSTOM),
        "name": Field(NAME, required=True),
        "description": Field(TEXT),
        "input_schema": Field(OBJECT, "JSON schema of the tool's input", required=True),
    },
)
_ONE_AT_A_TIME = {"disable_parallel_tool_use": Field(BOOL, "at most one tool is called")}
_TOOL_CHOICE = Tagged(
    "an object with type",
    "type",
    {
        "auto": Record("", _ONE_AT_A_TIME),
        "any": Record("", _ONE_AT_A_TIME),
        "tool": Record("", {"name": Field(FILLED_TEXT, required=True), **_ONE_AT_A_TIME}),
        "none": Record("", {}),
    },
    {},
)
_THINKING = Tagged(
    "an object with type",
    "type",
    {
        "enabled": Record("", {"budget_tokens": Field(integer(1), "ends thinking after so many tokens")}),
        "adaptive": Record("", {}),
        "disabled": Record("", {}),
    },
    {},
)
_FORMAT = Tagged(
    "an object with type", "type", {"json_schema": Record("", {"schema": Field(OBJECT, required=True)})}, {}
)
_PROMPT = {
    "model": GENERATION["model"],
    "messages": Field(
        ListOf(_MESSAGE, "a list of at least one message", least=1),
        "The conversation; if the assistant has the last word, the answer goes on from there.",
        required=True,
    ),
    "system": Field(_TEXTS, "Instructions ahead of the conversation."),
    "tools": Field(ListOf(_TOOL, "a list of tools"), "What the model may call."),
    "tool_choice": Field(_TOOL_CHOICE, "Whether and what the model must call."),
    "thinking": Field(_THINKING, "Whether the model thinks first; it does not unless asked."),
}
COUNT_TOKENS_BODY = Record("an object", _PROMPT)
MESSAGES_BODY = Record(
    "an object",
    {
        **_PROMPT,
        "max_tokens": Field(integer(1), "Most tokens of the answer, thinking included.", required=True),
        "stop_sequences": Field(STOP_STRINGS, "Texts that end the answer."),
        "temperature": Field(number(0, 1), "0 always takes the likeliest token."),
        "top_p": SAMPLING["top_p"],
        "top_k": Field(integer(0), "Keeps so many of the likeliest tokens; 0 keeps all."),
        "stream": Field(BOOL, "Answers with server-sent events."),
        "output_config": Field(
            Record("an object", {"format": Field(_FORMAT)}), "The form that the answer's text must have."
        ),
        "metadata": Field(OBJECT, "Ignored."),
    },
)


@dataclass(frozen=True)
class MessagesRequest(ChatRequest):
    """A body of /v1/messages. An answer for whose `max_tokens` the context has no room is cut, as Anthropic's is."""

    max_tokens: int = 1

    def variables(self, texts: Texts) -> Json:
        """The model does not think unless the client or the service says so: clients need not expect thoughts."""
        return {"enable_thinking": False, **super().variables(texts)}

    def params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        return super().params({**defaults, "max_tokens": self.max_tokens})

    def answer(self, served: Served) -> Answer:
        return MessageAnswer(served, self.max_tokens)

    def error_body(self, error: Exception) -> dict[str, Any]:
        return message_error(error)

    def error_events(self, error: Exception) -> bytes:
        return message_error_event(error)


@dataclass(frozen=True)
class CountTokensRequest(TextRequest):
    """A body of /v1/messages/count_tokens."""

    message: MessagesRequest

    def respond(self, texts: Texts) -> Json:
        return {"input_tokens": sum(len(prompt.token_ids) for prompt in self.message.prompts(texts))}

    def error_body(self, error: Exception) -> dict[str, Any]:
        return message_error(error)


def parse_messages(body: bytes) -> MessagesRequest:
    """Reads a request for a message. Raises RequestError."""
    given = MESSAGES_BODY.read_body(body)
    chat = _chat(given)
    same = ("temperature", "top_p", "top_k", "stream")
    chat |= {name: given[name] for name in same if name in given}
    chat["stop"] = given.get("stop_sequences")
    if form := given.get("output_config", {}).get("format"):
        chat["response_format"] = {"type": "json_schema", "json_schema": {"schema": form["schema"]}}
    return _request(chat, given["max_tokens"])


def parse_count_tokens(body: bytes) -> CountTokensRequest:
    """Reads a request to count a prompt's tokens. Raises RequestError."""
    message = _request(_chat(COUNT_TOKENS_BODY.read_body(body)), 1)
    return CountTokensRequest(message.model, message)


def _request(chat: Json, max_tokens: int) -> MessagesRequest:
    fields = chat_fields(chat)
    del fields["sampling"]["max_tokens"]
    names = {**fields["names"], "stop": "stop_sequences", "structured_outputs": "output_config.format"}
    return MessagesRequest(**{**fields, "names": names}, max_tokens=max_tokens)


def _chat(given: Json) -> Json:
    """The chat body with the same prompt."""
    messages = [m for message in given["messages"] for m in _chat_messages(message)]
    if system := _system(given.get("system", "")):
        messages.insert(0, {"role": "system", "content": system})
    chat: Json = {"model": given.get("model"), "messages": messages}
    if thinking := given.get("thinking"):
        chat["enable_thinking"] = thinking["type"] != "disabled"
        chat["thinking_token_budget"] = thinking.get("budget_tokens")
    if messages and messages[-1]["role"] == "assistant":
        chat |= {"continue_final_message": True, "add_generation_prompt": False}
    chat["tools"] = [_chat_tool(tool) for tool in given.get("tools", [])]
    return chat | _chat_tool_choice(given["tool_choice"]) if "tool_choice" in given else chat


def _chat_messages(message: Json) -> list[Json]:
    """The chat messages that `message` stands for: each tool's result is one of its own."""
    if isinstance(message["content"], str):
        return [message]
    if message["role"] == "assistant":
        return [_assistant_message(message["content"])]
    messages: list[Json] = []
    for block in message["content"]:
        if block["type"] == "tool_result":
            messages.append(_tool_message(block))
        elif block["type"] == "text":
            if not messages or messages[-1]["role"] != message["role"]:
                messages.append({"role": message["role"], "content": []})
            messages[-1]["content"].append(_text_part(block))
    return messages


def _assistant_message(blocks: list[Json]) -> Json:
    thinking = [block["thinking"] for block in blocks if block["type"] == "thinking"]
    calls = [_chat_call(block) for block in blocks if block["type"] == "tool_use"]
    return {
        "role": "assistant",
        "content": "".join(block["text"] for block in blocks if block["type"] == "text"),
        **({"reasoning_content": "\n".join(thinking)} if thinking else {}),
        **({"tool_calls": calls} if calls else {}),
    }


def _chat_call(block: Json) -> Json:
    arguments = json.dumps(block["input"], ensure_ascii=False)
    return {
        "id": block["id"],
        "type": "function",
        "function": {"name": block["name"], "arguments": arguments},
    }


def _tool_message(block: Json) -> Json:
    text = _joined(block.get("content", ""), "\n")
    text = f"Error: {text}" if block.get("is_error") else text
    return {"role": "tool", "tool_call_id": block["tool_use_id"], "content": text}


def _system(system: str | list[Json]) -> str:
    if not isinstance(system, str):
        system = [block for block in system if not block["text"].startswith(_BILLING)]
    return _joined(system, "\n\n")


def _joined(content: str | list[Json], separator: str) -> str:
    return content if isinstance(content, str) else separator.join(block["text"] for block in content)


def _text_part(block: Json) -> Json:
    return {"type": "text", "text": block["text"]}


def _chat_tool(tool: Json) -> Json:
    function = {"name": tool["name"], "description": tool.get("description", "")}
    return {"type": "function", "function": {**function, "parameters": tool["input_schema"]}}


def _chat_tool_choice(choice: Json) -> Json:
    kinds: dict[str, Any] = {"auto": "auto", "any": "required", "none": "none"}
    named = {"type": "function", "function": {"name": choice.get("name")}}
    parallel = not choice.get("disable_parallel_tool_use", False)
    return {"tool_choice": kinds.get(choice["type"], named), "parallel_tool_calls": parallel}
