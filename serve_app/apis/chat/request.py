"""Bodies of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from qwen3_dist.errors import RequestError
from qwen3_dist.sampling_params import MAX_LOGPROBS, SamplingParams, StructuredOutputs
from qwen3_dist.structured.grammar import compile_grammar
from qwen3_dist.structured.tool_grammar import compile_tool_calls
from qwen3_dist.text.choice import Reading
from qwen3_dist.text.output_parser import AnswerParser
from qwen3_dist.text.reasoning import Reasoning, reasoning_state
from qwen3_dist.text.tool_calls.stream import ToolCalls
from qwen3_dist.text.tool_calls.tags import ToolCallForm, tool_call_form
from serve_app.apis.chat.answer import ChatAnswer
from serve_app.apis.shared.answer import Answer, Served
from serve_app.apis.shared.body import Json, Must, Range, about, read_body, validate, without_nulls
from serve_app.apis.shared.conversation import (
    Messages,
    ToolChoice,
    Tools,
    plain_content,
    template_messages,
    template_tools,
)
from serve_app.apis.shared.generation import GenerationBody, GenerationRequest, read_generation
from serve_app.apis.shared.prompts import Prompt, Texts

Effort = Annotated[
    Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"],
    about("none answers without thinking."),
]
_OWN_VARIABLES = ("messages", "self", "tools")


def _is_variable(name: str) -> str:
    if name in _OWN_VARIABLES:
        raise ValueError
    return name


Variables = Annotated[
    dict[Annotated[str, AfterValidator(_is_variable)], Any],
    Must("an object of template variables other than messages and tools"),
    Field(json_schema_extra={"propertyNames": {"not": {"enum": [*_OWN_VARIABLES]}}}),
]


class ChatBody(GenerationBody):
    """A body of /v1/chat/completions."""

    messages: Annotated[Messages, about("The conversation so far.")]
    max_completion_tokens: (
        Annotated[int, Range(1), about("Most tokens of each choice, reasoning included.")] | None
    ) = None
    max_tokens: Annotated[int, Range(1), about("The older name of max_completion_tokens.")] | None = None
    logprobs: Annotated[bool, about("Gives each token's log-probability.")] = False
    top_logprobs: Annotated[int, Range(0, MAX_LOGPROBS), about("And those of so many alternatives.")] = 0
    tools: Annotated[Tools, about("Functions that the model may call.")] = Field(default_factory=list)
    tool_choice: (
        Annotated[ToolChoice, about("Whether it may, must or must not call, or which one it must.")] | None
    ) = None
    parallel_tool_calls: Annotated[bool, about("Whether it may call several at once.")] = True
    reasoning_effort: Effort | None = None
    enable_thinking: Annotated[bool, about("Whether the model thinks before it answers.")] | None = None
    include_reasoning: Annotated[bool, about("Whether its thoughts are shown.")] = True
    add_generation_prompt: Annotated[bool, about("Whether the assistant's next message is begun.")] | None = (
        None
    )
    continue_final_message: Annotated[bool, about("Goes on with the last message instead.")] = False
    echo: Annotated[bool, about("Shows the last message ahead of the answer, if it is the assistant's.")] = (
        False
    )
    add_special_tokens: Annotated[
        bool,
        about("Whether the prompt gets what the tokenizer puts around a text beside what the template has."),
    ] = False
    documents: Annotated[list[Json], Must("a list of objects"), about("For the chat template.")] | None = None
    chat_template_kwargs: Annotated[Variables, about("Variables for the chat template.")] = Field(
        default_factory=dict
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
    return ChatRequest(**_read(read_body(ChatBody, body)))


def chat_fields(body: Json) -> Json:
    """Constructor arguments of a ChatRequest. Raises RequestError.

    APIs that are chats in other words translate their body into chat's and read it by this.
    """
    return _read(validate(ChatBody, body))


def _read(body: ChatBody) -> Json:
    limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    read = read_generation(body, limit, ("top_logprobs", body.top_logprobs if body.logprobs else None))
    read["names"]["prompt"] = "messages"
    read["shown"] = replace(read["shown"], reasoning=body.include_reasoning, echo=body.echo)
    tools = _tools(body)
    form = read["names"].get("structured_outputs", "response_format")
    if tools["tool_choice"] == "required" and form != "response_format":
        raise RequestError(
            f"{form} and a tool_choice that requires a call both give a form; leave one out", param=form
        )
    return {
        **read,
        **tools,
        "messages": template_messages(body.messages),
        "template_kwargs": _template_kwargs(body),
        "add_special_tokens": body.add_special_tokens,
    }


def _tools(body: ChatBody) -> Json:
    """The tools that may be called, and how; ones that must not be called are not shown to the model."""
    tools = template_tools(body.tools)
    choice: Any = body.tool_choice or ("auto" if tools else "none")
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
        "custom_tools": frozenset(_tool_name(tool) for tool in body.tools if tool["type"] == "custom"),
        "parallel_tool_calls": body.parallel_tool_calls,
    }


def _tool_name(tool: Mapping[str, Any]) -> Any:
    """What a tool, or a choice of one, is called."""
    named = tool.get("function") or tool.get("custom")
    return named.get("name") if isinstance(named, dict) else None


def _template_kwargs(body: ChatBody) -> Json:
    """What the template is told; the most direct word for a variable wins."""
    effort, begun = body.reasoning_effort, body.add_generation_prompt
    kwargs: Json = {} if effort is None else {"reasoning_effort": effort, "enable_thinking": effort != "none"}
    kwargs |= without_nulls({"enable_thinking": body.enable_thinking, "documents": body.documents})
    continued = body.continue_final_message
    if continued and begun:
        raise RequestError(
            "continue_final_message and add_generation_prompt exclude each other; make one false",
            param="continue_final_message",
        )
    kwargs["add_generation_prompt"] = not continued if begun is None else begun
    return {**kwargs, "continue_final_message": continued, **body.chat_template_kwargs}
