"""/v1/chat/completions: request body and parsed request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from qwen3_dist.errors import RequestError
from qwen3_dist.sampling_params import MAX_LOGPROBS, SamplingParams, StructuredOutputs
from qwen3_dist.structured.grammar import compile_grammar
from qwen3_dist.structured.tool_grammar import compile_tool_calls
from qwen3_dist.text.choice import ParserSpec
from qwen3_dist.text.output_parser import AnswerParser
from qwen3_dist.text.reasoning import Reasoning, reasoning_state
from qwen3_dist.text.tool_calls.call_ids import call_ids
from qwen3_dist.text.tool_calls.stream import ToolCalls
from qwen3_dist.text.tool_calls.tags import ToolCallForm, tool_call_form
from serve_app.apis.chat.answer import ChatAnswer
from serve_app.apis.shared.answer import Answer, AnswerContext, Identity
from serve_app.apis.shared.body import Json, Must, Range, about, read_body, validate, without_nulls
from serve_app.apis.shared.conversation import (
    Messages,
    ToolChoice,
    Tools,
    plain_content,
    template_messages,
    template_tools,
)
from serve_app.apis.shared.errors import to_json
from serve_app.apis.shared.generation import GenerationBody, GenerationRequest, generation_fields
from serve_app.apis.shared.prompts import Prompt, PromptRenderer

Effort = Annotated[
    Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"],
    about("none answers without thinking; the chat template reads the rest."),
]
_RESERVED_VARIABLES = ("messages", "self", "tools")


def _is_variable(name: str) -> str:
    if name in _RESERVED_VARIABLES:
        raise ValueError
    return name


Variables = Annotated[
    dict[Annotated[str, AfterValidator(_is_variable)], Any],
    Must("an object of template variables other than messages and tools"),
    Field(json_schema_extra={"propertyNames": {"not": {"enum": [*_RESERVED_VARIABLES]}}}),
]


class ChatBody(GenerationBody):
    """A body of /v1/chat/completions."""

    messages: Annotated[Messages, about("The conversation so far.")]
    max_completion_tokens: (
        Annotated[int, Range(1), about("Maximum number of tokens of each choice, reasoning included.")] | None
    ) = None
    max_tokens: Annotated[int, Range(1), about("Deprecated name of max_completion_tokens.")] | None = None
    logprobs: Annotated[bool, about("Returns each token's log-probability.")] = False
    top_logprobs: Annotated[
        int, Range(0, MAX_LOGPROBS), about("Returns those of this many alternatives; requires logprobs.")
    ] = 0
    tools: Annotated[Tools, about("Functions that the model may call.")] = Field(default_factory=list)
    tool_choice: (
        Annotated[ToolChoice, about("Whether the model may or must call tools, and which.")] | None
    ) = None
    parallel_tool_calls: Annotated[bool, about("Whether the model may call several tools in one answer.")] = (
        True
    )
    reasoning_effort: Effort | None = None
    enable_thinking: Annotated[bool, about("Whether the model thinks before it answers.")] | None = None
    include_reasoning: Annotated[bool, about("Whether the answer includes reasoning.")] = True
    add_generation_prompt: (
        Annotated[bool, about("Whether the prompt begins the assistant's next message.")] | None
    ) = None
    continue_final_message: Annotated[bool, about("Continues the last message instead.")] = False
    echo: Annotated[
        bool, about("Returns the last message ahead of the answer, if it is the assistant's.")
    ] = False
    add_special_tokens: Annotated[
        bool,
        about("Whether the tokenizer adds its special tokens to those of the chat template."),
    ] = False
    documents: (
        Annotated[list[Json], Must("a list of objects"), about("Documents for the chat template.")] | None
    ) = None
    chat_template_kwargs: Annotated[Variables, about("Variables for the chat template.")] = Field(
        default_factory=dict
    )


@dataclass(frozen=True)
class ChatRequest(GenerationRequest):
    """A parsed request to /v1/chat/completions, or to another chat API that derives from it.

    `messages` and `tools` are in the form that chat templates read. `tool_choice` is "auto", "required" or "none";
    "none" if there are no tools, "required" if the client chose one tool, `named_tool`. `custom_tools` names the tools
    whose input is plain text.
    """

    messages: list[Json] = field(default_factory=list)
    tools: list[Json] = field(default_factory=list)
    custom_tools: frozenset[str] = frozenset()
    tool_choice: str = "none"
    named_tool: str | None = None
    parallel_tool_calls: bool = True
    template_kwargs: Json = field(default_factory=dict)
    add_special_tokens: bool = False

    @property
    def has_grammar(self) -> bool:
        return bool(self.tools) or super().has_grammar

    def params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        return super().params({"max_tokens": None, **defaults})

    def prompts(self, renderer: PromptRenderer) -> list[Prompt]:
        if renderer.tokenizer is None or renderer.template is None:
            missing = "tokenizer" if renderer.tokenizer is None else "chat template"
            raise RequestError(
                f"this model has no {missing}, so it cannot chat; use /v1/completions", param="messages"
            )
        variables = self.variables(renderer)
        if (
            self.identity
        ):  # a template that shows the time shows the same one whenever the request is answered
            variables = {"strftime_now": datetime.fromtimestamp(self.identity.created).strftime, **variables}
        rendered = renderer.template.render(self.messages, self.tools or None, **variables)
        return [renderer.tokenize(rendered, "messages", self.add_special_tokens)]

    def prompt_bytes(self) -> bytes:
        return to_json([self.model, self.terms.cache_salt, self.tools, self.messages])

    def variables(self, renderer: PromptRenderer) -> Json:
        """Returns the template's variables other than messages and tools."""
        return {**renderer.template_kwargs, **self.template_kwargs}

    def parser_spec(self, renderer: PromptRenderer, prompt: Prompt) -> ParserSpec:
        """Parses reasoning and tool calls, if the prompt and its template allow them."""
        assert renderer.template is not None and prompt.text is not None
        source = renderer.template.source(bool(self.tools))
        state = reasoning_state(prompt.text, source, self.variables(renderer))
        form = (renderer.tool_calls or tool_call_form(source)) if self.tools else None
        identity = self.identity or Identity()

        def new_parser(reasoning: str, choice: int) -> AnswerParser:
            required = self.tool_choice == "required"
            ids = call_ids(identity.unique, choice).__next__
            calls = ToolCalls(form, self.tools, ids, only_calls=required) if form else None
            return AnswerParser(Reasoning(reasoning), calls)

        return ParserSpec(
            state,
            self._structured_outputs(form),
            new_parser,
            reports_tool_calls=self.named_tool is None,
            max_tool_calls=None if self.parallel_tool_calls and self.named_tool is None else 1,
        )

    def _structured_outputs(self, form: ToolCallForm | None) -> StructuredOutputs | None:
        """Returns the constraint that tool calls put on the text, None if they put none.

        If a call is required, the text is calls alone. If the client asked for JSON, the text is either that or calls.
        If a tool is strict, calls within any text follow its schema.
        """
        requested: StructuredOutputs | None = self.sampling.get("structured_outputs")
        if form is None:
            if self.tool_choice == "required":
                raise RequestError(
                    "tool_choice cannot require a call: this model's chat template has no known tool-call format; "
                    "serve the model with --tool-calls json or xml",
                    param="tool_choice",
                )
            return None
        if requested is not None:
            compile_grammar(requested)
        compile_calls = partial(
            compile_tool_calls,
            self.tools,
            named=self.named_tool,
            parallel=self.parallel_tool_calls,
            form=form,
        )
        if self.tool_choice == "required":
            return compile_calls()
        if requested is not None:
            return None if requested.schema is None else compile_calls(otherwise=requested.schema)
        strict = any(tool["function"].get("strict") for tool in self.tools)
        return compile_calls(text=True) if strict else None

    def answer(self, context: AnswerContext) -> Answer:
        last = self.messages[-1]
        echoed = plain_content(last) if self.options.echo and last["role"] == "assistant" else ""
        return ChatAnswer(context, self.options, echoed, self.custom_tools)


def parse_chat(body: bytes) -> ChatRequest:
    """Parses a body of /v1/chat/completions. Raises RequestError."""
    return ChatRequest(**_request_fields(read_body(ChatBody, body)))


def chat_fields(body: Json) -> Json:
    """Returns the constructor arguments of a ChatRequest for a decoded `body`. Raises RequestError.

    Other chat APIs translate their body to one of /v1/chat/completions and pass it to this function.
    """
    return _request_fields(validate(ChatBody, body))


def _request_fields(body: ChatBody) -> Json:
    max_tokens_field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs requires logprobs to be true", param="top_logprobs")
    num_logprobs = body.top_logprobs if body.logprobs else None
    fields = generation_fields(body, max_tokens_field, "top_logprobs", num_logprobs)
    fields["client_names"]["prompt"] = "messages"
    fields["options"] = replace(fields["options"], reasoning=body.include_reasoning, echo=body.echo)
    tools = _tools(body)
    format_field = fields["client_names"].get("structured_outputs", "response_format")
    if tools["tool_choice"] == "required" and format_field != "response_format":
        raise RequestError(
            f"{format_field} and a tool_choice that requires a call both set the output format; leave one out",
            param=format_field,
        )
    return {
        **fields,
        **tools,
        "messages": template_messages(body.messages),
        "template_kwargs": _template_kwargs(body),
        "add_special_tokens": body.add_special_tokens,
    }


def _tools(body: ChatBody) -> Json:
    """Returns a ChatRequest's fields for tools, without tools that must not be called."""
    tools = template_tools(body.tools)
    choice: Any = body.tool_choice or ("auto" if tools else "none")
    if isinstance(choice, dict) and choice["type"] == "allowed_tools":
        allowed = [_tool_name(tool) for tool in choice["allowed_tools"]["tools"]]
        tools = [tool for tool in tools if _tool_name(tool) in allowed]
        choice = choice["allowed_tools"]["mode"]
    named = None if isinstance(choice, str) else _tool_name(choice)
    if not tools and (named or choice == "required"):
        raise RequestError("tool_choice requires tools; add them or leave it out", param="tool_choice")
    names = [_tool_name(tool) for tool in tools]
    if named and named not in names:
        raise RequestError(
            f"tool_choice names {named!r}, which is not one of the tools: {', '.join(names)}",
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
    """Returns the name in a tool or in a tool_choice."""
    named = tool.get("function") or tool.get("custom")
    return named.get("name") if isinstance(named, dict) else None


def _template_kwargs(body: ChatBody) -> Json:
    """Returns the template's variables: chat_template_kwargs override enable_thinking, that reasoning_effort."""
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
