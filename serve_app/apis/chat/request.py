"""Bodies of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from qwen3_dist.errors import RequestError
from qwen3_dist.sampling_params import MAX_LOGPROBS, SamplingParams, StructuredOutputs
from qwen3_dist.structured.grammar import compile_grammar
from qwen3_dist.structured.tool_grammar import compile_tool_calls
from qwen3_dist.text.choice import Reading
from qwen3_dist.text.output_parser import AnswerParser
from qwen3_dist.text.reasoning import Reasoning, reasoning_state
from qwen3_dist.text.tool_calls.stream import ToolCallForm, ToolCalls, tool_call_form
from serve_app.apis.chat.answer import ChatAnswer
from serve_app.apis.shared.answer import Answer, Served
from serve_app.apis.shared.conversation import (
    MESSAGES,
    TOOL_CHOICE,
    TOOLS,
    plain_content,
    template_messages,
    template_tools,
)
from serve_app.apis.shared.generation import GENERATION, GenerationRequest, read_generation
from serve_app.apis.shared.kinds import BOOL, OBJECT, Field, Json, ListOf, Plain, Record, integer, one_of
from serve_app.apis.shared.prompts import Prompt, Texts

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_OWN_VARIABLES = {"self", "messages", "tools"}
_VARIABLES = Plain(
    "an object of template variables other than messages and tools",
    {"type": "object", "propertyNames": {"not": {"enum": sorted(_OWN_VARIABLES)}}},
    lambda value: not value.keys() & _OWN_VARIABLES,
)
CHAT_BODY = Record(
    "an object",
    {
        **GENERATION,
        "messages": Field(MESSAGES, "The conversation so far.", required=True),
        "max_completion_tokens": Field(integer(1), "Most tokens of each choice, reasoning included."),
        "max_tokens": Field(integer(1), "The older name of max_completion_tokens."),
        "logprobs": Field(BOOL, "Gives each token's log-probability."),
        "top_logprobs": Field(integer(0, MAX_LOGPROBS), "And those of so many alternatives."),
        "tools": Field(TOOLS, "Functions that the model may call."),
        "tool_choice": Field(TOOL_CHOICE, "Whether it may, must or must not call, or which one it must."),
        "parallel_tool_calls": Field(BOOL, "Whether it may call several at once."),
        "reasoning_effort": Field(one_of(*_EFFORTS), "none answers without thinking."),
        "enable_thinking": Field(BOOL, "Whether the model thinks before it answers."),
        "include_reasoning": Field(BOOL, "Whether its thoughts are shown."),
        "add_generation_prompt": Field(BOOL, "Whether the assistant's next message is begun."),
        "continue_final_message": Field(BOOL, "Goes on with the last message instead."),
        "echo": Field(BOOL, "Shows the last message ahead of the answer, if it is the assistant's."),
        "add_special_tokens": Field(
            BOOL,
            "Whether the prompt gets what the tokenizer puts around a text beside what the template has.",
        ),
        "documents": Field(ListOf(OBJECT, "a list of objects"), "For the chat template."),
        "chat_template_kwargs": Field(_VARIABLES, "Variables for the chat template."),
    },
)


@dataclass(frozen=True)
class ChatRequest(GenerationRequest):
    """A body of /v1/chat/completions.

    `tool_choice` is "none" where there are no tools, and "required" where the client names one (`named_tool`).
    `custom_tools` are the names of those whose input is plain text.
    """

    messages: list[Json] = field(default_factory=list)
    tools: list[Json] = field(default_factory=list)
    custom_tools: frozenset[str] = frozenset()
    tool_choice: str = "none"
    named_tool: str | None = None
    parallel_tool_calls: bool = True
    continued: bool = False
    template_kwargs: Json = field(default_factory=dict)
    add_special_tokens: bool = False

    def params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        return super().params({"max_tokens": None, **defaults})

    def prompts(self, texts: Texts) -> list[Prompt]:
        if texts.tokenizer is None or texts.template is None:
            lacks = "tokenizer" if texts.tokenizer is None else "chat template"
            raise RequestError(
                f"this model has no {lacks}, so it cannot chat; use /v1/completions", param="messages"
            )
        rendered = texts.template.render(self.messages, self.tools or None, **self.variables(texts))
        return [texts.prompt(rendered, "messages", self.add_special_tokens)]

    def variables(self, texts: Texts) -> Json:
        """What the template is told beside messages and tools."""
        return {**texts.template_kwargs, **self.template_kwargs}

    def reading(self, texts: Texts, prompt: Prompt) -> Reading:
        """Thoughts and tool calls are told from text, as far as the prompt and its template allow them."""
        assert texts.template is not None and prompt.text is not None
        source = texts.template.source(bool(self.tools))
        state = reasoning_state(prompt.text, source, self.variables(texts))
        form = (texts.tool_calls or tool_call_form(source)) if self.tools else None

        def new_parser(reasoning: str) -> AnswerParser:
            required = self.tool_choice == "required"
            calls = ToolCalls(form, self.tools, only_calls=required) if form else None
            return AnswerParser(Reasoning(reasoning), calls)

        return Reading(
            state,
            self._form(form),
            new_parser,
            calls_end_it=self.named_tool is None,
            most_calls=None if self.parallel_tool_calls and self.named_tool is None else 1,
        )

    def _form(self, calls: ToolCallForm | None) -> StructuredOutputs | None:
        """What calls make of the form that the text must have.

        Required ones are all there is; others may come in place of the JSON that is asked for; and where a tool
        is strict, calls that come after any text follow its schema.
        """
        asked: StructuredOutputs | None = self.sampling.get("structured_outputs")
        if calls is None:
            if self.tool_choice == "required":
                raise RequestError(
                    "tool_choice cannot require a call: this model's chat template shows no form of one; "
                    "serve the model with --tool-calls json or xml",
                    param="tool_choice",
                )
            return None
        if asked is not None:
            compile_grammar(asked)
        form = partial(
            compile_tool_calls,
            self.tools,
            named=self.named_tool,
            parallel=self.parallel_tool_calls,
            form=calls,
        )
        if self.tool_choice == "required":
            return form()
        if asked is not None:
            return None if asked.schema is None else form(otherwise=asked.schema)
        strict = any(tool["function"].get("strict") for tool in self.tools)
        return form(text=True) if strict else None

    def answer(self, served: Served) -> Answer:
        last = self.messages[-1]
        echoed = plain_content(last) if self.shown.echo and last["role"] == "assistant" else ""
        return ChatAnswer(served, self.shown, echoed, self.custom_tools)


def parse_chat(body: bytes) -> ChatRequest:
    """Reads a chat request. Raises RequestError."""
    return ChatRequest(**_read(CHAT_BODY.read_body(body)))


def chat_fields(body: Json) -> Json:
    """Constructor arguments of a ChatRequest. Raises RequestError.

    APIs that are chats in other words translate their body into chat's and read it by this.
    """
    return _read(CHAT_BODY.read(body, ""))


def _read(given: Json) -> Json:
    limit = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
    wanted, top = given.get("logprobs", False), given.get("top_logprobs", 0)
    if top and not wanted:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    read = read_generation(given, limit, ("top_logprobs", top if wanted else None))
    read["names"]["prompt"] = "messages"
    read["shown"] = replace(
        read["shown"], reasoning=given.get("include_reasoning", True), echo=given.get("echo", False)
    )
    tools = _tools(given)
    form = read["names"].get("structured_outputs", "response_format")
    if tools["tool_choice"] == "required" and form != "response_format":
        raise RequestError(
            f"{form} and a tool_choice that requires a call both give a form; leave one out", param=form
        )
    return {
        **read,
        **tools,
        "messages": template_messages(given["messages"]),
        "template_kwargs": _template_kwargs(given),
        "add_special_tokens": given.get("add_special_tokens", False),
    }


def _tools(given: Json) -> Json:
    """The tools that may be called, and how; ones that must not be called are not shown to the model."""
    offered = given.get("tools", [])
    tools = template_tools(offered)
    choice: Any = given.get("tool_choice", "auto" if tools else "none")
    if isinstance(choice, dict) and choice["type"] == "allowed_tools":
        allowed = [_tool_name(tool) for tool in choice["allowed_tools"]["tools"]]
        tools = [tool for tool in tools if _tool_name(tool) in allowed]
        choice = choice["allowed_tools"]["mode"]
    named = None if isinstance(choice, str) else _tool_name(choice)
    if not tools and (named or choice == "required"):
        raise RequestError("tool_choice needs tools to choose from", param="tool_choice")
    names = [_tool_name(tool) for tool in tools]
    if named and named not in names:
        raise RequestError(
            f"tool_choice names {named!r}, which is none of the tools: {', '.join(names)}",
            param="tool_choice",
        )
    return {
        "tools": [] if choice == "none" else tools,
        "tool_choice": "required" if named else choice,
        "named_tool": named,
        "custom_tools": frozenset(_tool_name(tool) for tool in offered if tool.get("type") == "custom"),
        "parallel_tool_calls": given.get("parallel_tool_calls", True),
    }


def _tool_name(tool: Json) -> Any:
    """What a tool, or a choice of one, is called."""
    named = tool.get("function") or tool.get("custom")
    return named.get("name") if isinstance(named, dict) else None


def _template_kwargs(given: Json) -> Json:
    """What the template is told; the most direct word for a variable wins."""
    kwargs: Json = {}
    if "reasoning_effort" in given:
        effort = given["reasoning_effort"]
        kwargs |= {"reasoning_effort": effort, "enable_thinking": effort != "none"}
    if "enable_thinking" in given:
        kwargs["enable_thinking"] = given["enable_thinking"]
    if "documents" in given:
        kwargs["documents"] = given["documents"]
    continued = given.get("continue_final_message", False)
    begun = given.get("add_generation_prompt", not continued)
    if continued and begun:
        raise RequestError(
            "continue_final_message and add_generation_prompt exclude each other; make one false",
            param="continue_final_message",
        )
    kwargs["add_generation_prompt"] = begun
    return {**kwargs, "continue_final_message": continued, **given.get("chat_template_kwargs", {})}
