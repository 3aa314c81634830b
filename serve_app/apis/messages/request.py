"""/v1/messages and /v1/messages/count_tokens: bodies, and their translation to a chat request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Required

from pydantic import Field
from typing_extensions import TypedDict

from qwen3_dist.errors import RequestError
from qwen3_dist.sampling_params import SamplingParams
from serve_app.apis.chat.request import ChatRequest, chat_fields
from serve_app.apis.messages.answer import (
    THREAD_UNSUPPORTED,
    MessageAnswer,
    message_error,
    message_error_event,
)
from serve_app.apis.messages.history import Message, TextContent, chat_conversation, first_empty_user_message
from serve_app.apis.messages.tools import client_tools
from serve_app.apis.shared.answer import Answer, AnswerContext
from serve_app.apis.shared.body import (
    Body,
    ByTag,
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
from serve_app.apis.shared.conversation import Name
from serve_app.apis.shared.prompts import PromptRenderer
from serve_app.apis.shared.sampling import StopStrings, TopP
from serve_app.apis.shared.validation_errors import short
from serve_app.apis.tokens import TextRequest


class _CustomTool(TypedDict, total=False):
    type: Literal["custom"]
    name: Required[Name]
    description: str
    input_schema: Required[Annotated[Json, about("JSON schema of the tool's input.")]]
    strict: Annotated[
        bool, about("Constrains calls to the schema; a schema with unsupported keywords is refused.")
    ]


class _Choice(TypedDict, total=False):
    type: Required[Literal["auto", "any"]]
    disable_parallel_tool_use: Annotated[bool, about("Allows at most one tool call.")]


class _ChosenTool(TypedDict, total=False):
    type: Required[Literal["tool"]]
    name: Required[Filled]
    disable_parallel_tool_use: Annotated[bool, ignored("a named tool is called exactly once.")]


class _NoTool(TypedDict):
    type: Literal["none"]


class _Thinks(TypedDict, total=False):
    type: Required[Literal["enabled"]]
    budget_tokens: Annotated[int, Range(1), about("Ends thinking after this many tokens.")]


class _Thinking(TypedDict):
    type: Literal["adaptive", "disabled"]


class _Format(TypedDict):
    type: Literal["json_schema"]
    schema: Json


class _OutputConfig(Body):
    format: Annotated[_Format, ByTag("type", "an object with type")] | None = None


class CountTokensBody(Body):
    """A body of /v1/messages/count_tokens, and the part of /v1/messages that makes the prompt."""

    model: ModelName = ""
    messages: Annotated[
        list[Message],
        Must("a list of at least one message", 1),
        about("The conversation; a last message of the assistant is continued."),
    ]
    system: Annotated[TextContent, about("The system prompt.")] = ""
    tools: Annotated[
        list[
            Annotated[
                _CustomTool | Json, ByTag("type", "an object with name and input_schema", untagged="custom")
            ]
        ],
        Must("a list of tools"),
        about("The tools that the model may call."),
    ] = Field(default_factory=list)
    tool_choice: (
        Annotated[
            _Choice | _ChosenTool | _NoTool,
            ByTag("type", "an object with type"),
            about("Whether the model may or must call tools, and which."),
        ]
        | None
    ) = None
    thinking: (
        Annotated[
            _Thinks | _Thinking,
            ByTag("type", "an object with type"),
            about("Whether the model thinks first; by default it does not."),
        ]
        | None
    ) = None


class MessagesBody(CountTokensBody):
    """A body of /v1/messages."""

    max_tokens: Annotated[int, Range(1), about("Maximum number of tokens of the answer, thinking included.")]
    stop_sequences: Annotated[StopStrings, about("Strings that end the answer.")] | None = None
    temperature: Annotated[float, Range(0, 1), about("0 always picks the likeliest token.")] | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, Range(0), about("Keeps this many of the likeliest tokens; 0 keeps all.")] | None = (
        None
    )
    stream: Annotated[bool, about("Answers with server-sent events.")] = False
    output_config: Annotated[_OutputConfig, about("The format that the answer's text must have.")] | None = (
        None
    )
    metadata: Annotated[Json, ignored("abuse by single users is not monitored.")] | None = None
    cache_salt: CacheSalt | None = None


@dataclass(frozen=True)
class MessagesRequest(ChatRequest):
    """A parsed request to /v1/messages.

    `max_tokens` may exceed the room in the context, which then ends the answer, as in Anthropic's API.
    """

    max_tokens: int = 1

    def variables(self, renderer: PromptRenderer) -> Json:
        """Returns the template's variables. Thinking is off by default, since clients may not expect it."""
        return {"enable_thinking": False, **super().variables(renderer)}

    def params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        return super().params({**defaults, "max_tokens": self.max_tokens})

    def answer(self, context: AnswerContext) -> Answer:
        return MessageAnswer(context, self.max_tokens)

    def error_body(self, error: Exception) -> dict[str, Any]:
        return message_error(error)

    @property
    def ping(self) -> bytes:
        """Anthropic's event of that name."""
        return b'event: ping\ndata: {"type": "ping"}\n\n'

    def error_events(self, error: Exception, sent: bytes) -> bytes:
        return message_error_event(error)


@dataclass(frozen=True)
class CountTokensRequest(TextRequest):
    """A parsed request to /v1/messages/count_tokens."""

    message: MessagesRequest

    def respond(self, renderer: PromptRenderer) -> Json:
        return {"input_tokens": sum(len(prompt.token_ids) for prompt in self.message.prompts(renderer))}

    def error_body(self, error: Exception) -> dict[str, Any]:
        return message_error(error)


def parse_messages(body: bytes) -> MessagesRequest:
    """Parses a body of /v1/messages. Raises RequestError."""
    given = read_body(MessagesBody, body)
    chat = _chat(given)
    chat |= {name: getattr(given, name) for name in ("temperature", "top_p", "top_k", "stream", "cache_salt")}
    chat["stop"] = given.stop_sequences
    if given.output_config and (form := given.output_config.format):
        schema = {"schema": form["schema"], "strict": True}
        chat["response_format"] = {"type": "json_schema", "json_schema": schema}
    return _request(chat, given.max_tokens)


def parse_count_tokens(body: bytes) -> CountTokensRequest:
    """Parses a body of /v1/messages/count_tokens. Raises RequestError."""
    message = _request(_chat(read_body(CountTokensBody, body)), 1)
    return CountTokensRequest(message.model, message)


def _refuse_thread(given: Json) -> None:
    """Raises RequestError for a body that refers to a conversation stored on the server.

    Clients of Anthropic's API react to the error's code by sending the whole conversation.
    """
    if given.get("thread"):
        raise RequestError(
            "thread is not supported: conversations are not stored; leave it out and send all messages",
            param="thread",
            code=THREAD_UNSUPPORTED,
        )


def _request(chat: Json, max_tokens: int) -> MessagesRequest:
    fields = chat_fields(chat)
    fields["sampling"].pop("max_tokens", None)
    names = {**fields["client_names"], "stop": "stop_sequences", "structured_outputs": "output_config.format"}
    return MessagesRequest(**{**fields, "client_names": names}, max_tokens=max_tokens)


def _chat(body: CountTokensBody) -> Json:
    """Returns the body of /v1/chat/completions with the same prompt."""
    _refuse_thread(body.undeclared)
    messages = chat_conversation(body.system, body.messages)
    empty = first_empty_user_message(body.messages) if messages else 0
    if empty is not None:
        raise RequestError(
            f"messages[{empty}].content must have something that the model reads, such as a text block, not "
            f"{short(body.messages[empty]['content'])}",
            param=f"messages[{empty}].content",
        )
    chat: Json = {"model": body.model, "messages": messages, "tools": _chat_tools(body.tools)}
    if body.thinking:
        chat["enable_thinking"] = body.thinking["type"] != "disabled"
        chat["thinking_token_budget"] = body.thinking.get("budget_tokens")
    if messages and messages[-1]["role"] == "assistant":
        chat |= {"continue_final_message": True, "add_generation_prompt": False}
    return chat | _chat_tool_choice(body.tool_choice, body.tools) if body.tool_choice else chat


def _chat_tools(tools: Sequence[Mapping[str, Any]]) -> list[Json]:
    """Returns the functions for tools that the client runs. Tools run by Anthropic are left out."""
    return [_chat_tool(tool) for tool in tools if tool["type"] == "custom"] + client_tools(tools)


def _chat_tool(tool: Mapping[str, Any]) -> Json:
    function = {"name": tool["name"], "description": tool.get("description", "")}
    strict = {"strict": tool["strict"]} if "strict" in tool else {}
    return {"type": "function", "function": {**function, "parameters": tool["input_schema"], **strict}}


def _chat_tool_choice(choice: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> Json:
    name = choice.get("name")
    client_names = [tool["function"]["name"] for tool in _chat_tools(tools)]
    if name not in client_names and name in [tool.get("name") for tool in tools]:
        raise RequestError(
            f"tool_choice.name={name} is a tool that Anthropic runs, which this service cannot; leave it out",
            param="tool_choice.name",
        )
    kinds: dict[str, Any] = {"auto": "auto", "any": "required", "none": "none"}
    named = {"type": "function", "function": {"name": name}}
    parallel = not choice.get("disable_parallel_tool_use", False)
    return {"tool_choice": kinds.get(choice["type"], named), "parallel_tool_calls": parallel}
