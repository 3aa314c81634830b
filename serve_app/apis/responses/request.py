"""/v1/responses: the body, and its translation to a chat request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Required, cast

from pydantic import Field
from typing_extensions import TypedDict

from qwen3_dist.errors import RequestError
from qwen3_dist.sampling_params import MAX_LOGPROBS
from serve_app.apis.chat.request import ChatRequest, Effort, chat_fields
from serve_app.apis.responses.answer import ResponseAnswer, next_error_event
from serve_app.apis.responses.history import Item, chat_conversation
from serve_app.apis.responses.store import DISABLED_STORE, ResponseStore
from serve_app.apis.responses.tools import (
    CalledTool,
    Tool,
    ToolChoice,
    called_tools,
    chat_tool_choice,
    chat_tools,
)
from serve_app.apis.shared.answer import Answer, AnswerContext
from serve_app.apis.shared.body import (
    Body,
    ByTag,
    ByType,
    CacheSalt,
    Filled,
    Json,
    ModelName,
    Must,
    Range,
    about,
    ignored,
    read_body,
)  # fmt: skip
from serve_app.apis.shared.sampling import Temperature, TopP
from serve_app.apis.shared.structure import NOT_SHOWN

_INPUT = "a string or a list of items"
_LOGPROBS = "message.output_text.logprobs"


class _PlainFormat(TypedDict):
    type: Literal["text", "json_object"]


class _SchemaFormat(TypedDict, total=False):
    type: Required[Literal["json_schema"]]
    name: Required[Annotated[Filled, ignored(NOT_SHOWN)]]
    schema: Required[Json]
    strict: bool
    description: Annotated[str, ignored(NOT_SHOWN)]


class _Text(TypedDict, total=False):
    format: Annotated[_PlainFormat | _SchemaFormat, ByTag("type", "an object with type")]


class _Reasoning(TypedDict, total=False):
    effort: Effort


class ResponsesBody(Body):
    """A body of /v1/responses."""

    model: ModelName = ""
    input: (
        Annotated[
            str | Annotated[list[Item], Must("a list of items")],
            ByType(_INPUT),
            about("The conversation, or its continuation after previous_response_id."),
        ]
        | None
    ) = None
    previous_response_id: (
        Annotated[Filled, about("A stored response whose conversation continues.")] | None
    ) = None
    instructions: Annotated[str, about("A system message ahead of the input.")] | None = None
    max_output_tokens: (
        Annotated[int, Range(1), about("Maximum number of tokens of the answer, reasoning included.")] | None
    ) = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    stream: Annotated[bool, about("Answers with server-sent events.")] = False
    tools: Annotated[list[Tool], Must("a list of tools"), about("Functions that the model may call.")] = (
        Field(default_factory=list)
    )
    tool_choice: (
        Annotated[ToolChoice, about("Whether the model may or must call tools, and which.")] | None
    ) = None
    parallel_tool_calls: Annotated[bool, about("Whether the model may call several tools in one answer.")] = (
        True
    )
    text: Annotated[_Text, Must("an object"), about("The format that the text must have.")] | None = None
    reasoning: Annotated[_Reasoning, Must("an object"), about("How much the model thinks first.")] | None = (
        None
    )
    metadata: Annotated[Json, about("Repeated in the response.")] = Field(default_factory=dict)
    user: Annotated[str, about("Repeated in the response.")] | None = None
    truncation: (
        Annotated[Literal["auto", "disabled"], ignored("input that is too long is always refused.")] | None
    ) = None
    include: Annotated[
        list[str],
        Must("a list of strings"),
        about(f"{_LOGPROBS} adds log-probabilities; other values are ignored."),
    ] = Field(default_factory=list)
    top_logprobs: (
        Annotated[
            int, Range(0, MAX_LOGPROBS), about("Adds log-probabilities, and those of this many alternatives.")
        ]
        | None
    ) = None
    store: Annotated[bool, about("Whether later requests may refer to the response.")] = True
    cache_salt: CacheSalt | None = None


_ECHOED_FIELDS = (
    "instructions", "max_output_tokens", "temperature", "top_p", "top_logprobs", "metadata", "user", "reasoning",
)  # fmt: skip
_EMPTY = {"role": "user", "content": ""}  # the message for input without any text for the model
_STORED_BY_OPENAI = "is not supported: it refers to data stored by OpenAI; send the data as input"
_UNSUPPORTED = {
    "conversation": _STORED_BY_OPENAI,
    "prompt": _STORED_BY_OPENAI,
    "background": "is not supported: closing the connection cancels a response; leave it out",
}


@dataclass(frozen=True)
class ResponsesRequest(ChatRequest):
    """A parsed request to /v1/responses. ResponseAnswer describes the fields."""

    echoed_fields: dict[str, Any] = field(default_factory=dict)
    called_tools: dict[str, CalledTool] = field(default_factory=dict)

    def answer(self, context: AnswerContext) -> Answer:
        return ResponseAnswer(context, self.echoed_fields, self.called_tools, self.options.logprobs)

    def error_events(self, error: Exception, sent: bytes) -> bytes:
        return next_error_event(error, sent)


@dataclass(frozen=True)
class ParsedResponsesRequest:
    """A parsed request, with what the store needs to keep its answer.

    The input `items` follow the stored response `previous`, whose conversation is `history`. `is_stored` tells whether
    to keep the answer.
    """

    request: ResponsesRequest
    items: list[Json]
    previous: str | None
    history: list[Json]
    is_stored: bool


def parse_responses(body: bytes) -> ResponsesRequest:
    """Parses a body of /v1/responses without a store. Raises RequestError."""
    return read_responses(body).request


def read_responses(body: bytes, store: ResponseStore = DISABLED_STORE) -> ParsedResponsesRequest:
    """Parses a body of /v1/responses that may refer to responses in `store`. Raises RequestError."""
    given = read_body(ResponsesBody, body)
    for name, reason in _UNSUPPORTED.items():
        if given.undeclared.get(name):
            raise RequestError(f"{name} {reason}", param=name)
    previous = given.previous_response_id
    if given.input is None and previous is None:
        raise RequestError(f"input is required: {_INPUT}", param="input")
    history = store.conversation(previous)
    items = store.resolve_references(_items(given))
    conversation = [*history, *items]
    tools = _tools(given, conversation)
    fields = chat_fields(_chat(given, conversation or [_EMPTY], tools))
    names = {
        "max_tokens": "max_output_tokens",
        "messages": "input",
        "prompt": "input",
        "structured_outputs": "text.format",
    }
    is_stored = store.is_enabled and given.store
    request = ResponsesRequest(
        **{**fields, "client_names": names},
        echoed_fields=_echoed_fields(given, is_stored),
        called_tools=called_tools(tools),
    )
    return ParsedResponsesRequest(request, items, previous, history, is_stored)


def _items(body: ResponsesBody) -> list[Json]:
    if isinstance(body.input, str):
        return [{"role": "user", "content": body.input}]
    return cast(list[Json], body.input or [])


def _tools(body: ResponsesBody, conversation: list[Json]) -> list[Mapping[str, Any]]:
    """Returns the tools of the body and of `additional_tools` items."""
    added = [item["tools"] for item in conversation if item.get("type") == "additional_tools"]
    return [*body.tools, *(tool for tools in added for tool in tools)]


def _chat(body: ResponsesBody, conversation: list[Json], tools: list[Mapping[str, Any]]) -> Json:
    """Returns the body of /v1/chat/completions for `conversation`, the stored and the new input items."""
    same_fields = ("model", "temperature", "top_p", "stream", "parallel_tool_calls", "cache_salt")
    chat = {name: getattr(body, name) for name in same_fields}
    chat["max_tokens"] = body.max_output_tokens
    chat["messages"] = chat_conversation(body.instructions, conversation) or [_EMPTY]
    if _LOGPROBS in body.include or body.top_logprobs:
        chat |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    chat["reasoning_effort"] = (body.reasoning or {}).get("effort")
    if form := (body.text or {}).get("format"):
        named = {"type": "json_schema", "json_schema": {k: v for k, v in form.items() if k != "type"}}
        chat["response_format"] = named if form["type"] == "json_schema" else form
    chat["tools"] = chat_tools(tools)
    chat["tool_choice"] = chat_tool_choice(body.tool_choice, tools)
    return chat


def _echoed_fields(body: ResponsesBody, is_stored: bool) -> Json:
    """Returns the fields that the response repeats, complete as OpenAI's client library requires them."""
    blank = {"description": None, "parameters": None, "strict": None}
    return {
        **{name: getattr(body, name) for name in _ECHOED_FIELDS},
        "parallel_tool_calls": body.parallel_tool_calls,
        "tool_choice": body.tool_choice or "auto",
        "tools": [{**blank, **tool} if tool["type"] == "function" else tool for tool in body.tools],
        "text": {"format": {"type": "text"}, **(body.text or {})},
        "truncation": "disabled",
        "previous_response_id": body.previous_response_id,
        "store": is_stored,
    }
