"""Bodies of OpenAI's /v1/responses, translated into chat's words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qwen3_dist.errors import RequestError
from qwen3_dist.sampling_params import MAX_LOGPROBS
from serve_app.apis.chat.request import ChatRequest, chat_fields
from serve_app.apis.responses.answer import ResponseAnswer, response_error_event
from serve_app.apis.responses.history import ITEM, chat_conversation
from serve_app.apis.responses.store import NOTHING_KEPT, ResponseStore
from serve_app.apis.responses.tools import (
    TOOL,
    TOOL_CHOICE,
    Called,
    called_tools,
    chat_tool_choice,
    chat_tools,
)
from serve_app.apis.shared.answer import Answer, Served
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
    integer,
    one_of,
)
from serve_app.apis.shared.older import EFFORT, MODEL, TEMPERATURE, TOP_P
from serve_app.apis.shared.structure import NOT_SHOWN

_FORMAT = Tagged(
    "an object with type",
    "type",
    {
        "text": Record("", {}),
        "json_object": Record("", {}),
        "json_schema": Record(
            "",
            {
                "name": Field(FILLED_TEXT, required=True, ignored=NOT_SHOWN),
                "schema": Field(OBJECT, required=True),
                "strict": Field(BOOL),
                "description": Field(TEXT, ignored=NOT_SHOWN),
            },
        ),
    },
    {},
)
_INPUT = Either("a string or a list of items", (TEXT, ListOf(ITEM, "a list of items")))
_LOGPROBS = "message.output_text.logprobs"
RESPONSES_BODY = Record(
    "an object",
    {
        "model": MODEL,
        "input": Field(_INPUT, "The conversation so far, or what follows previous_response_id."),
        "previous_response_id": Field(FILLED_TEXT, "A stored response whose conversation goes on."),
        "instructions": Field(TEXT, "A system message ahead of the input."),
        "max_output_tokens": Field(integer(1), "Most tokens of the answer, reasoning included."),
        "temperature": TEMPERATURE,
        "top_p": TOP_P,
        "stream": Field(BOOL, "Answers with server-sent events."),
        "tools": Field(ListOf(TOOL, "a list of tools"), "Functions that the model may call."),
        "tool_choice": Field(TOOL_CHOICE, "Whether and what the model must call."),
        "parallel_tool_calls": Field(BOOL, "Whether it may call several at once."),
        "text": Field(Record("an object", {"format": Field(_FORMAT)}), "The form that the text must have."),
        "reasoning": Field(Record("an object", {"effort": EFFORT}), "How much it thinks first."),
        "metadata": Field(OBJECT, "Comes back in the answer."),
        "user": Field(TEXT, "Comes back in the answer."),
        "truncation": Field(
            one_of("auto", "disabled"), ignored="input that is too long is refused either way."
        ),
        "include": Field(
            ListOf(TEXT, "a list of strings"), f"{_LOGPROBS} gives log-probabilities; others are ignored."
        ),
        "top_logprobs": Field(integer(0, MAX_LOGPROBS), "And those of so many alternatives."),
        "store": Field(
            BOOL, "Whether later requests may refer to the response; they may unless this is false."
        ),
    },
)
_REPEATED = (
    "instructions", "max_output_tokens", "temperature", "top_p", "top_logprobs", "metadata", "user", "reasoning",
)  # fmt: skip
_EMPTY = {"role": "user", "content": ""}  # what no input says, nor items that a model cannot read
_ELSEWHERE = "is not supported: OpenAI has it in its own store; send it as input"
_NOT_BUILT = {
    "conversation": _ELSEWHERE,
    "prompt": _ELSEWHERE,
    "background": "is not supported: a response ends with its connection; leave it out",
}


@dataclass(frozen=True)
class ResponsesRequest(ChatRequest):
    """A body of /v1/responses; `asked` are its fields that the answer repeats, `called` what its tools' calls are."""

    asked: dict[str, Any] = field(default_factory=dict)
    called: dict[str, Called] = field(default_factory=dict)

    def answer(self, served: Served) -> Answer:
        return ResponseAnswer(served, self.asked, self.called, self.shown.logprobs)

    def error_events(self, error: Exception) -> bytes:
        return response_error_event(error)


@dataclass(frozen=True)
class ResponsesRead:
    """A request, its own input `items`, which follow the response `previous`, whose conversation is `history`, and
    whether the answer is `kept`."""

    request: ResponsesRequest
    items: list[Json]
    previous: str | None
    history: list[Json]
    kept: bool


def parse_responses(body: bytes) -> ResponsesRequest:
    """Reads a request for a response, where nothing is stored. Raises RequestError."""
    return read_responses(body).request


def read_responses(body: bytes, store: ResponseStore = NOTHING_KEPT) -> ResponsesRead:
    """Reads a request for a response with what `store` has. Raises RequestError."""
    given = RESPONSES_BODY.read_body(body)
    for name, why in _NOT_BUILT.items():
        if given.get(name):
            raise RequestError(f"{name} {why}", param=name)
    previous = given.get("previous_response_id")
    if "input" not in given and previous is None:
        raise RequestError(f"input is required: {_INPUT.words}", param="input")
    history = store.conversation(previous)
    items = store.resolved(_items(given))
    conversation = [*history, *items]
    tools = _tools(given, conversation)
    fields = chat_fields(_chat(given, conversation or [_EMPTY], tools))
    names = {
        "max_tokens": "max_output_tokens",
        "messages": "input",
        "prompt": "input",
        "structured_outputs": "text.format",
    }
    kept = store.keeps and given.get("store", True)
    request = ResponsesRequest(
        **{**fields, "names": names}, asked=_asked(given, kept), called=called_tools(tools)
    )
    return ResponsesRead(request, items, previous, history, kept)


def _items(given: Json) -> list[Json]:
    wanted: str | list[Json] = given.get("input", [])
    return [{"role": "user", "content": wanted}] if isinstance(wanted, str) else wanted


def _tools(given: Json, history: list[Json]) -> list[Json]:
    """The tools of the body, and those that its items add."""
    added = [item["tools"] for item in history if item.get("type") == "additional_tools"]
    return [*given.get("tools", []), *(tool for tools in added for tool in tools)]


def _chat(given: Json, history: list[Json], tools: list[Json]) -> Json:
    same = ("model", "temperature", "top_p", "stream", "parallel_tool_calls")
    chat = {name: given[name] for name in same if name in given}
    chat["max_tokens"] = given.get("max_output_tokens")
    chat["messages"] = chat_conversation(given.get("instructions"), history) or [_EMPTY]
    if _LOGPROBS in given.get("include", []) or given.get("top_logprobs"):
        chat |= {"logprobs": True, "top_logprobs": given.get("top_logprobs", 0)}
    chat["reasoning_effort"] = given.get("reasoning", {}).get("effort")
    if form := given.get("text", {}).get("format"):
        named = {"type": "json_schema", "json_schema": {k: v for k, v in form.items() if k != "type"}}
        chat["response_format"] = named if form["type"] == "json_schema" else form
    chat["tools"] = chat_tools(tools)
    chat["tool_choice"] = chat_tool_choice(given.get("tool_choice"), tools)
    return chat


def _asked(given: Json, kept: bool) -> Json:
    """What the answer repeats, as the client library's types want it."""
    blank = {"description": None, "parameters": None, "strict": None}
    tools = given.get("tools", [])
    return {
        **{name: given.get(name) for name in _REPEATED},
        "metadata": given.get("metadata", {}),
        "parallel_tool_calls": given.get("parallel_tool_calls", True),
        "tool_choice": given.get("tool_choice", "auto"),
        "tools": [{**blank, **tool} if tool["type"] == "function" else tool for tool in tools],
        "text": {"format": {"type": "text"}, **given.get("text", {})},
        "truncation": "disabled",
        "previous_response_id": given.get("previous_response_id"),
        "store": kept,
    }
