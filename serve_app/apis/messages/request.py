"""Bodies of Anthropic's /v1/messages and /v1/messages/count_tokens, translated into chat's words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen3_dist.errors import RequestError
from qwen3_dist.sampling_params import SamplingParams
from serve_app.apis.chat.request import ChatRequest, chat_fields
from serve_app.apis.messages.answer import (
    THREAD_UNSUPPORTED,
    MessageAnswer,
    message_error,
    message_error_event,
)
from serve_app.apis.messages.history import MESSAGE, TEXTS, chat_conversation, silent_user
from serve_app.apis.messages.tools import client_tools
from serve_app.apis.shared.answer import Answer, Served
from serve_app.apis.shared.kinds import (
    BOOL,
    FILLED_TEXT,
    OBJECT,
    TEXT,
    Field,
    Json,
    ListOf,
    Record,
    Tagged,
    integer,
    number,
    short,
)
from serve_app.apis.shared.older import MODEL, NAME, STOP_STRINGS, TOP_P
from serve_app.apis.shared.prompts import Texts
from serve_app.apis.tokens import TextRequest

_TOOL = Tagged(
    "an object with name and input_schema",
    "type",
    {
        "custom": Record(
            "",
            {
                "name": Field(NAME, required=True),
                "description": Field(TEXT),
                "input_schema": Field(OBJECT, "JSON schema of the tool's input.", required=True),
                "strict": Field(BOOL, "Calls follow the schema, which is refused where that cannot be held."),
            },
        )
    },
    {},
    untagged="custom",
    others=True,
)
_ONE_AT_A_TIME = {"disable_parallel_tool_use": Field(BOOL, "at most one tool is called")}
_TOOL_CHOICE = Tagged(
    "an object with type",
    "type",
    {
        "auto": Record("", _ONE_AT_A_TIME),
        "any": Record("", _ONE_AT_A_TIME),
        "tool": Record(
            "",
            {
                "name": Field(FILLED_TEXT, required=True),
                "disable_parallel_tool_use": Field(BOOL, ignored="a named tool is called once in any case."),
            },
        ),
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
    "model": MODEL,
    "messages": Field(
        ListOf(MESSAGE, "a list of at least one message", least=1),
        "The conversation; if the assistant has the last word, the answer goes on from there.",
        required=True,
    ),
    "system": Field(TEXTS, "Instructions ahead of the conversation."),
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
        "top_p": TOP_P,
        "top_k": Field(integer(0), "Keeps so many of the likeliest tokens; 0 keeps all."),
        "stream": Field(BOOL, "Answers with server-sent events."),
        "output_config": Field(
            Record("an object", {"format": Field(_FORMAT)}), "The form that the answer's text must have."
        ),
        "metadata": Field(OBJECT, ignored="nobody here looks for abuse by single users."),
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
        asked = {"schema": form["schema"], "strict": True}
        chat["response_format"] = {"type": "json_schema", "json_schema": asked}
    return _request(chat, given["max_tokens"])


def parse_count_tokens(body: bytes) -> CountTokensRequest:
    """Reads a request to count a prompt's tokens. Raises RequestError."""
    message = _request(_chat(COUNT_TOKENS_BODY.read_body(body)), 1)
    return CountTokensRequest(message.model, message)


def _refuse_thread(given: Json) -> None:
    """Raises RequestError where the body leaves out what the server would have kept: without that the conversation is
    another one. Anthropic's clients know the code, and send all of it."""
    if given.get("thread"):
        raise RequestError(
            "thread is not supported: conversations are not kept here; leave it out and send all messages",
            param="thread",
            code=THREAD_UNSUPPORTED,
        )


def _request(chat: Json, max_tokens: int) -> MessagesRequest:
    fields = chat_fields(chat)
    fields["sampling"].pop("max_tokens", None)
    names = {**fields["names"], "stop": "stop_sequences", "structured_outputs": "output_config.format"}
    return MessagesRequest(**{**fields, "names": names}, max_tokens=max_tokens)


def _chat(given: Json) -> Json:
    """The chat body with the same prompt."""
    _refuse_thread(given)
    messages = chat_conversation(given.get("system", ""), given["messages"])
    silent = silent_user(given["messages"]) if messages else 0
    if silent is not None:
        raise RequestError(
            f"messages[{silent}].content must have something that the model reads, such as a text block, not "
            f"{short(given['messages'][silent]['content'])}",
            param=f"messages[{silent}].content",
        )
    chat: Json = {"model": given.get("model"), "messages": messages}
    if thinking := given.get("thinking"):
        chat["enable_thinking"] = thinking["type"] != "disabled"
        chat["thinking_token_budget"] = thinking.get("budget_tokens")
    if messages and messages[-1]["role"] == "assistant":
        chat |= {"continue_final_message": True, "add_generation_prompt": False}
    chat["tools"] = _chat_tools(given.get("tools", []))
    return chat | _chat_tool_choice(given) if "tool_choice" in given else chat


def _chat_tools(tools: list[Json]) -> list[Json]:
    """Those of `tools` that a client runs; what Anthropic runs is left out."""
    clients = [tool for tool in tools if tool.get("type", "custom") == "custom"]
    return [_chat_tool(tool) for tool in clients] + client_tools(tools)


def _chat_tool(tool: Json) -> Json:
    function = {"name": tool["name"], "description": tool.get("description", "")}
    strict = {"strict": tool["strict"]} if "strict" in tool else {}
    return {"type": "function", "function": {**function, "parameters": tool["input_schema"], **strict}}


def _chat_tool_choice(given: Json) -> Json:
    choice = given["tool_choice"]
    name = choice.get("name")
    if name in [tool.get("name") for tool in given.get("tools", [])] and name not in [
        tool["function"]["name"] for tool in _chat_tools(given["tools"])
    ]:
        raise RequestError(
            f"tool_choice.name={name} is a tool that Anthropic runs; this service has none, so leave it out",
            param="tool_choice.name",
        )
    kinds: dict[str, Any] = {"auto": "auto", "any": "required", "none": "none"}
    named = {"type": "function", "function": {"name": name}}
    parallel = not choice.get("disable_parallel_tool_use", False)
    return {"tool_choice": kinds.get(choice["type"], named), "parallel_tool_calls": parallel}
