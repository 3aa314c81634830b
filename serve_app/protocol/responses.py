"""Bodies of OpenAI's /v1/responses, translated into chat's words. Nothing is stored: each request says all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qwen3_dist.errors import RequestError
from serve_app.answers.base import Answer, Served
from serve_app.answers.responses import ResponseAnswer, response_error_event
from serve_app.protocol.chat import CHAT_BODY, ChatRequest, chat_fields
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
    one_of,
)
from serve_app.protocol.sampling import SAMPLING

_STORED = "is not supported: no response is stored, so send the whole conversation as input"
_TEXT_PART = Record("", {"text": Field(TEXT, required=True)})
_NO_FILES = "is not supported: the model reads text alone"
_REFUSED_PARTS = {kind: _NO_FILES for kind in ("input_image", "input_file", "input_audio")}


def _content(*kinds: str) -> Either:
    part = Tagged("a content part", "type", dict.fromkeys(kinds, _TEXT_PART), _REFUSED_PARTS)
    return Either("a string or a list of text parts", (TEXT, ListOf(part, "a list of text parts")))


_ITEM = Tagged(
    "an input item",
    "type",
    {
        "message": Record(
            "",
            {
                "role": Field(one_of("user", "assistant", "system", "developer"), required=True),
                "content": Field(_content("input_text", "output_text"), required=True),
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
                "call_id": Field(TEXT, required=True),
                "name": Field(FILLED_TEXT, required=True),
                "arguments": Field(TEXT, "JSON text", required=True),
            },
        ),
        "function_call_output": Record(
            "",
            {
                "call_id": Field(TEXT, required=True),
                "output": Field(_content("input_text"), required=True),
            },
        ),
    },
    {"item_reference": _STORED},
    untagged="message",
)
_TOOL = Tagged(
    "a tool",
    "type",
    {
        "function": Record(
            "",
            {
                "name": Field(NAME, required=True),
                "description": Field(TEXT),
                "parameters": Field(OBJECT, "JSON schema of the arguments"),
                "strict": Field(BOOL),
            },
        )
    },
    {},
)
_TOOL_NAME = Record("", {"name": Field(FILLED_TEXT, required=True)})
_TOOL_CHOICE = Either(
    'one of "none", "auto", "required", or an object with type',
    (
        one_of("none", "auto", "required"),
        Tagged("an object with type", "type", {"function": _TOOL_NAME}, {}),
    ),
)
_FORMAT = Tagged(
    "an object with type",
    "type",
    {
        "text": Record("", {}),
        "json_object": Record("", {}),
        "json_schema": Record(
            "",
            {
                "name": Field(FILLED_TEXT, required=True),
                "schema": Field(OBJECT, required=True),
                "strict": Field(BOOL),
                "description": Field(TEXT),
            },
        ),
    },
    {},
)
_INPUT = Either(
    "a string or a list of at least one item", (TEXT, ListOf(_ITEM, "a list of at least one item", least=1))
)
_LOGPROBS = "message.output_text.logprobs"
_INCLUDED = Plain(
    "a string other than log-probabilities, which /v1/chat/completions gives",
    {"type": "string", "not": {"const": _LOGPROBS}},
    lambda value: value != _LOGPROBS,
)
RESPONSES_BODY = Record(
    "an object",
    {
        "model": GENERATION["model"],
        "input": Field(_INPUT, "The conversation so far.", required=True),
        "instructions": Field(TEXT, "A system message ahead of the input."),
        "max_output_tokens": Field(integer(1), "Most tokens of the answer, reasoning included."),
        "temperature": SAMPLING["temperature"],
        "top_p": SAMPLING["top_p"],
        "stream": Field(BOOL, "Answers with server-sent events."),
        "tools": Field(ListOf(_TOOL, "a list of tools"), "Functions that the model may call."),
        "tool_choice": Field(_TOOL_CHOICE, "Whether and what the model must call."),
        "parallel_tool_calls": Field(BOOL, "Whether it may call several at once."),
        "text": Field(Record("an object", {"format": Field(_FORMAT)}), "The form that the text must have."),
        "reasoning": Field(
            Record("an object", {"effort": CHAT_BODY.fields["reasoning_effort"]}), "How much it thinks first."
        ),
        "metadata": Field(OBJECT, "Comes back in the answer."),
        "user": Field(TEXT, "Comes back in the answer."),
        "truncation": Field(one_of("auto", "disabled"), "Input that is too long is refused either way."),
        "include": Field(ListOf(_INCLUDED, "a list of strings"), "Ignored."),
        "store": Field(BOOL, "Ignored: nothing is stored."),
    },
)
_REPEATED = ("instructions", "max_output_tokens", "temperature", "top_p", "metadata", "user", "reasoning")
_NOT_BUILT = {
    "previous_response_id": _STORED,
    "conversation": _STORED,
    "prompt": _STORED,
    "top_logprobs": "is not supported here: /v1/chat/completions gives log-probabilities",
    "background": "is not supported: nothing is stored that could be asked for later; leave it out",
}


@dataclass(frozen=True)
class ResponsesRequest(ChatRequest):
    """A body of /v1/responses; `asked` are its fields that the answer repeats."""

    asked: dict[str, Any] = field(default_factory=dict)

    def answer(self, served: Served) -> Answer:
        return ResponseAnswer(served, self.asked)

    def error_events(self, error: Exception) -> bytes:
        return response_error_event(error)


def parse_responses(body: bytes) -> ResponsesRequest:
    """Reads a request for a response. Raises RequestError."""
    given = RESPONSES_BODY.read_body(body)
    for name, why in _NOT_BUILT.items():
        if given.get(name):
            raise RequestError(f"{name} {why}", param=name)
    fields = chat_fields(_chat(given))
    names = {
        "max_tokens": "max_output_tokens",
        "messages": "input",
        "prompt": "input",
        "structured_outputs": "text.format",
    }
    return ResponsesRequest(**{**fields, "names": names}, asked=_asked(given))


def _chat(given: Json) -> Json:
    same = ("model", "temperature", "top_p", "stream", "parallel_tool_calls")
    chat = {name: given[name] for name in same if name in given}
    chat["max_tokens"] = given.get("max_output_tokens")
    chat["messages"] = _chat_messages(given)
    chat["reasoning_effort"] = given.get("reasoning", {}).get("effort")
    if form := given.get("text", {}).get("format"):
        named = {"type": "json_schema", "json_schema": {k: v for k, v in form.items() if k != "type"}}
        chat["response_format"] = named if form["type"] == "json_schema" else form
    chat["tools"] = [_chat_tool(tool) for tool in given.get("tools", [])]
    choice = given.get("tool_choice")
    if isinstance(choice, dict):
        choice = {"type": "function", "function": {"name": choice["name"]}}
    chat["tool_choice"] = choice
    return chat


def _chat_messages(given: Json) -> list[Json]:
    messages: list[Json] = []
    if instructions := given.get("instructions"):
        messages.append({"role": "system", "content": instructions})
    if isinstance(given["input"], str):
        return [*messages, {"role": "user", "content": given["input"]}]
    for item in given["input"]:
        _add_item(messages, item)
    return messages


def _add_item(messages: list[Json], item: Json) -> None:
    """Adds `item`; what one turn of the assistant had of reasoning, text and calls is one chat message."""
    kind = item.get("type", "message")
    if kind == "function_call_output":
        messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": _joined(item["output"])})
    elif kind == "message" and item["role"] != "assistant":
        messages.append({"role": item["role"], "content": _joined(item["content"])})
    elif kind == "reasoning":
        texts = item.get("content") or item.get("summary") or []
        turn = _turn(messages, "reasoning_content", "content", "tool_calls")
        turn["reasoning_content"] = "\n".join(t["text"] for t in texts)
    elif kind == "message":
        _turn(messages, "content", "tool_calls")["content"] = _joined(item["content"])
    else:
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        _turn(messages).setdefault("tool_calls", []).append(call)


def _turn(messages: list[Json], *taken: str) -> Json:
    """The assistant's message under way, or a new one if one of the parts `taken` is there already."""
    last = messages[-1] if messages else {}
    if last.get("role") == "assistant" and not any(last.get(part) for part in taken):
        return last
    messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _joined(content: str | list[Json]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _chat_tool(tool: Json) -> Json:
    return {"type": "function", "function": {name: v for name, v in tool.items() if name != "type"}}


def _asked(given: Json) -> Json:
    """What the answer repeats, as the client library's types want it."""
    blank = {"description": None, "parameters": None, "strict": None}
    return {
        **{name: given.get(name) for name in _REPEATED},
        "metadata": given.get("metadata", {}),
        "parallel_tool_calls": given.get("parallel_tool_calls", True),
        "tool_choice": given.get("tool_choice", "auto"),
        "tools": [{**blank, **tool} for tool in given.get("tools", [])],
        "text": {"format": {"type": "text"}, **given.get("text", {})},
        "truncation": "disabled",
        "previous_response_id": None,
        "store": False,
    }
