"""Bodies of OpenAI's /v1/responses, translated into chat's words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Required, cast

from pydantic import Field
from typing_extensions import TypedDict

from qwen3_dist.errors import RequestError
from qwen3_dist.sampling_params import MAX_LOGPROBS
from serve_app.apis.chat.request import ChatRequest, Effort, chat_fields
from serve_app.apis.responses.answer import ResponseAnswer, response_error_event
from serve_app.apis.responses.history import Item, chat_conversation
from serve_app.apis.responses.store import NOTHING_KEPT, ResponseStore
from serve_app.apis.responses.tools import (
    Called,
    Tool,
    ToolChoice,
    called_tools,
    chat_tool_choice,
    chat_tools,
)
from serve_app.apis.shared.answer import Answer, Served
from serve_app.apis.shared.body import (
    Body,
    ByTag,
    ByType,
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
            about("The conversation so far, or what follows previous_response_id."),
        ]
        | None
    ) = None
    previous_response_id: Annotated[Filled, about("A stored response whose conversation goes on.")] | None = (
        None
    )
    instructions: Annotated[str, about("A system message ahead of the input.")] | None = None
    max_output_tokens: (
        Annotated[int, Range(1), about("Most tokens of the answer, reasoning included.")] | None
    ) = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    stream: Annotated[bool, about("Answers with server-sent events.")] = False
    tools: Annotated[list[Tool], Must("a list of tools"), about("Functions that the model may call.")] = (
        Field(default_factory=list)
    )
    tool_choice: Annotated[ToolChoice, about("Whether and what the model must call.")] | None = None
    parallel_tool_calls: Annotated[bool, about("Whether it may call several at once.")] = True
    text: Annotated[_Text, Must("an object"), about("The form that the text must have.")] | None = None
    reasoning: Annotated[_Reasoning, Must("an object"), about("How much it thinks first.")] | None = None
    metadata: Annotated[Json, about("Comes back in the answer.")] = Field(default_factory=dict)
    user: Annotated[str, about("Comes back in the answer.")] | None = None
    truncation: (
        Annotated[Literal["auto", "disabled"], ignored("input that is too long is refused either way.")]
        | None
    ) = None
    include: Annotated[
        list[str],
        Must("a list of strings"),
        about(f"{_LOGPROBS} gives log-probabilities; others are ignored."),
    ] = Field(default_factory=list)
    top_logprobs: (
        Annotated[int, Range(0, MAX_LOGPROBS), about("And those of so many alternatives.")] | None
    ) = None
    store: Annotated[bool, about("Whether later requests may refer to the response.")] = True


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
    given = read_body(ResponsesBody, body)
    for name, why in _NOT_BUILT.items():
        if given.undeclared.get(name):
            raise RequestError(f"{name} {why}", param=name)
    previous = given.previous_response_id
    if given.input is None and previous is None:
        raise RequestError(f"input is required: {_INPUT}", param="input")
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
    kept = store.keeps and given.store
    request = ResponsesRequest(
        **{**fields, "names": names}, asked=_asked(given, kept), called=called_tools(tools)
    )
    return ResponsesRead(request, items, previous, history, kept)


def _items(body: ResponsesBody) -> list[Json]:
    if isinstance(body.input, str):
        return [{"role": "user", "content": body.input}]
    return cast(list[Json], body.input or [])


def _tools(body: ResponsesBody, history: list[Json]) -> list[Mapping[str, Any]]:
    """The tools of the body, and those that its items add."""
    added = [item["tools"] for item in history if item.get("type") == "additional_tools"]
    return [*body.tools, *(tool for tools in added for tool in tools)]


def _chat(body: ResponsesBody, history: list[Json], tools: list[Mapping[str, Any]]) -> Json:
    same = ("model", "temperature", "top_p", "stream", "parallel_tool_calls")
    chat = {name: getattr(body, name) for name in same}
    chat["max_tokens"] = body.max_output_tokens
    chat["messages"] = chat_conversation(body.instructions, history) or [_EMPTY]
    if _LOGPROBS in body.include or body.top_logprobs:
        chat |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    chat["reasoning_effort"] = (body.reasoning or {}).get("effort")
    if form := (body.text or {}).get("format"):
        named = {"type": "json_schema", "json_schema": {k: v for k, v in form.items() if k != "type"}}
        chat["response_format"] = named if form["type"] == "json_schema" else form
    chat["tools"] = chat_tools(tools)
    chat["tool_choice"] = chat_tool_choice(body.tool_choice, tools)
    return chat


def _asked(body: ResponsesBody, kept: bool) -> Json:
    """What the answer repeats, as the client library's types want it."""
    blank = {"description": None, "parameters": None, "strict": None}
    return {
        **{name: getattr(body, name) for name in _REPEATED},
        "parallel_tool_calls": body.parallel_tool_calls,
        "tool_choice": body.tool_choice or "auto",
        "tools": [{**blank, **tool} if tool["type"] == "function" else tool for tool in body.tools],
        "text": {"format": {"type": "text"}, **(body.text or {})},
        "truncation": "disabled",
        "previous_response_id": body.previous_response_id,
        "store": kept,
    }
