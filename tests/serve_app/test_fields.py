"""Every field that an API accepts is read, or says why it is ignored."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from qwen3_dist.errors import RequestError
from qwen3_dist.structured import tool_grammar
from qwen3_dist.text.chat_template import ChatTemplate
from qwen3_dist.text.tokenizer import Tokenizer
from qwen3_dist.weights.source import bundled_path
from serve_app.apis.chat import request as chat_module
from serve_app.apis.chat.request import ChatBody, parse_chat
from serve_app.apis.completions import CompletionBody, parse_completion
from serve_app.apis.embeddings import EmbeddingBody, parse_embedding
from serve_app.apis.messages.request import (
    CountTokensBody,
    CountTokensRequest,
    MessagesBody,
    parse_count_tokens,
    parse_messages,
)
from serve_app.apis.rerank import RerankBody, ScoreBody, parse_rerank, parse_score
from serve_app.apis.responses.request import (
    ParsedResponsesRequest,
    ResponsesBody,
    ResponsesRequest,
    read_responses,
)
from serve_app.apis.shared.body import Body
from serve_app.apis.shared.generation import GenerationRequest
from serve_app.apis.shared.pooling import PoolingRequest
from serve_app.apis.shared.prompts import PromptRenderer
from serve_app.apis.shared.schema import schema_of
from serve_app.apis.tokens import (
    DetokenizeBody,
    TextRequest,
    TokenizeBody,
    parse_detokenize,
    parse_tokenize,
)
from tests.serve_app.field_walk import Place, places

# Shows all that it is given; its last line is what tells that a model can think.
TEMPLATE = """{{ messages | tojson }} {{ tools | tojson }} {{ documents | tojson }} {{ reasoning_effort }}
{{ add_generation_prompt }} {{ continue_final_message }} {{ enable_thinking }} {{ first }}"""


class Store:
    """Has every response and item; each says its id."""

    is_enabled = True

    def conversation(self, response_id: str | None) -> list[dict[str, Any]]:
        return [{"role": "user", "content": response_id}] if response_id else []

    def resolve_references(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        kept = [item for item in items if item.get("type") != "item_reference"]
        return [*kept, *self.conversation(next((i["id"] for i in items if i not in kept), None))]


APIS: dict[str, tuple[type[Body], Callable[[bytes], Any]]] = {
    "chat": (ChatBody, parse_chat),
    "completions": (CompletionBody, parse_completion),
    "responses": (ResponsesBody, lambda body: read_responses(body, Store())),  # type: ignore[arg-type]
    "messages": (MessagesBody, parse_messages),
    "count_tokens": (CountTokensBody, parse_count_tokens),
    "embeddings": (EmbeddingBody, parse_embedding),
    "rerank": (RerankBody, parse_rerank),
    "score": (ScoreBody, parse_score),
    "tokenize": (TokenizeBody, parse_tokenize),
    "detokenize": (DetokenizeBody, parse_detokenize),
}
PLACES = [(api, place) for api, (body, _) in APIS.items() for place in places(schema_of(body))]


TWO_TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("first", "a-second-one")
]
ITS_TOOLS = {
    "chat": TWO_TOOLS,
    "responses": [{"type": "function", **tool["function"]} for tool in TWO_TOOLS],
    "messages": [{"name": name, "input_schema": {"type": "object"}} for name in ("first", "a-second-one")],
}
ITS_TOOLS["count_tokens"] = ITS_TOOLS["messages"]
TOKENIZE_CHAT = ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
# What a field needs beside it in the body, by API and the beginning of the field's path.
BESIDE: list[tuple[str, str, dict[str, Any]]] = [
    ("", "stream_options", {"stream": True}),
    ("", "stream_options.continuous_usage_stats", {"stream_options": {"include_usage": True}}),
    ("chat", "top_logprobs", {"logprobs": True}),
    ("completions", "echo", {"max_tokens": 1}),
    ("responses", "", {"input": "Hello"}),
    ("responses", "top_logprobs", {"include": ["message.output_text.logprobs"]}),
    ("tokenize", "model", {"prompt": "Hello"}),
    ("tokenize", "add_special_tokens", {"prompt": "Hello"}),
    ("tokenize", "return_token_strs", {"prompt": "Hello"}),
    *(("tokenize", name, {"messages": [{"role": "user", "content": "Hello"}]}) for name in TOKENIZE_CHAT),
    *((api, "tool_choice", {"tools": tools}) for api, tools in ITS_TOOLS.items()),
    *((api, "parallel_tool_calls", {"tools": tools}) for api, tools in ITS_TOOLS.items()),
]


HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


def _grammar(syntax: str) -> dict[str, Any]:
    return {"name": "f", "format": {"type": "grammar", "syntax": syntax, "definition": "x"}}


def _allowed(api: str, mode: str, name: str) -> dict[str, Any]:
    allowed = {"mode": mode, "tools": [ITS_TOOLS["responses"][name == "first"]]}
    chosen = (
        allowed
        if api == "responses"
        else {"allowed_tools": {**allowed, "tools": [TWO_TOOLS[name == "first"]]}}
    )
    said = {"input": "Hello"} if api == "responses" else HELLO
    return {**said, "tools": ITS_TOOLS[api], "tool_choice": {"type": "allowed_tools", **chosen}}


def _namespaces(kind: str, namespace: str) -> dict[str, Any]:
    tool = {"type": kind, "name": "f"}
    spaces = [{"type": "namespace", "name": name, "tools": [tool]} for name in ("one", "two")]
    return {"input": "Hello", "tools": spaces, "tool_choice": {**tool, "namespace": namespace}}


# Fields that show in bodies which no table gives: two bodies that mean different things, or of which one is refused.
SPOKEN: dict[str, list[dict[str, Any]]] = {
    "responses include": [
        {"input": "a", "include": [part]}
        for part in ("message.output_text.logprobs", "reasoning.encrypted_content")
    ],
    "chat best_of": [{**HELLO, "best_of": 1}, {**HELLO, "best_of": 2}],
    "completions best_of": [{"prompt": "a", "best_of": 1}, {"prompt": "a", "best_of": 2}],
    **{
        f"{api} structured_outputs.json_object": [
            {**said, "structured_outputs": {"json_object": value}} for value in (True, False)
        ]
        for api, said in (("chat", HELLO), ("completions", {"prompt": "a"}))
    },
    **{
        f"{api} tools[]<custom>.custom.format.syntax": [
            {**HELLO, "tools": [{"type": "custom", "custom": _grammar(syntax)}]}
            for syntax in ("lark", "regex")
        ]
        for api in ("chat", "tokenize")
    },
    "responses tools[]<custom>.format.syntax": [
        {"input": "a", "tools": [{"type": "custom", **_grammar(syntax)}]} for syntax in ("lark", "regex")
    ],
    "responses tools[]<namespace>.tools[]<custom>.format.syntax": [
        {
            "input": "a",
            "tools": [{"type": "namespace", "name": "n", "tools": [{"type": "custom", **_grammar(syntax)}]}],
        }
        for syntax in ("lark", "regex")
    ],
    **{
        f"responses input[]<additional_tools>.tools[]{where}<custom>.format.syntax": [
            {
                "input": [
                    {"type": "additional_tools", "tools": tools(syntax)},
                    {"role": "user", "content": "a"},
                ]
            }
            for syntax in ("lark", "regex")
        ]
        for where, tools in (
            ("", lambda syntax: [{"type": "custom", **_grammar(syntax)}]),
            (
                "<namespace>.tools[]",
                lambda syntax: [
                    {"type": "namespace", "name": "n", "tools": [{"type": "custom", **_grammar(syntax)}]}
                ],
            ),
        )
    },
    **{
        f"responses tool_choice<{kind}>.namespace": [_namespaces(kind, name) for name in ("one", "two")]
        for kind in ("function", "custom")
    },
    **{
        f"{api} tool_choice<allowed_tools>{inner}.mode": [
            _allowed(api, mode, "first") for mode in ("auto", "required")
        ]
        for api, inner in (("chat", ".allowed_tools"), ("responses", ""))
    },
    **{
        f"{api} tool_choice<allowed_tools>{inner}.tools": [
            _allowed(api, "auto", name) for name in ("first", "other")
        ]
        for api, inner in (("chat", ".allowed_tools"), ("responses", ""))
    },
}


def body_of(api: str, place: Place, body: Any) -> bytes:
    beside = [more for one, path, more in BESIDE if one in ("", api) and place.path.startswith(path)]
    for more in beside:
        body = _merged(more, body)
    if api == "responses" and place.path.startswith("input[]"):
        body = {**body, "input": [*body["input"], {"role": "user", "content": "And then?"}]}
    if api in ("messages", "count_tokens") and place.path.startswith("messages[]"):
        body = {**body, "messages": [*body["messages"], {"role": "user", "content": "And then?"}]}
    return json.dumps(body).encode()


def _merged(below: Any, above: Any) -> Any:
    """`above` with what `below` has more; nulls of `above` count as there."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return {**below, **{name: _merged(below.get(name), value) for name, value in above.items()}}


@pytest.fixture(scope="module")
def renderer() -> PromptRenderer:
    backend = tokenizers.Tokenizer.from_file(str(bundled_path() / "tokenizer.json"))
    end = ("<|endoftext|>", backend.token_to_id("<|endoftext|>"))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        "$A <|endoftext|>", special_tokens=[end]
    )
    tokenizer = Tokenizer(backend)
    return PromptRenderer(tokenizer, ChatTemplate({"default": TEMPLATE}, {}), 4096, tool_calls="json")


def effect(request: Any, renderer: PromptRenderer) -> str:
    """All that `request` makes the service do, as text."""
    if isinstance(request, ParsedResponsesRequest):
        rest = dataclasses.replace(request, request=None)  # type: ignore[arg-type]
        return f"{dataclasses.replace(rest, items=[])} {effect(request.request, renderer)}"
    if isinstance(request, CountTokensRequest):
        return effect(request.message, renderer)
    if isinstance(request, TextRequest):
        return f"{request.model} {request.respond(renderer)}"
    if isinstance(request, PoolingRequest):
        prompts = request.prompts(renderer)
        return f"{dataclasses.replace(request)} {prompts}"
    assert isinstance(request, GenerationRequest)
    [prompt, *_] = prompts = request.prompts(renderer)
    params = dataclasses.replace(request.params({}), spaces_between_special_tokens=True)  # nothing reads that
    seen = [params, request.model, request.stream, request.options, request.terms, prompts]
    spec = request.parser_spec(renderer, prompt)
    seen.append(dataclasses.replace(spec, new_parser=None))
    if isinstance(request, ResponsesRequest):
        seen += [
            request.called_tools,
            {name: request.echoed_fields[name] for name in ("metadata", "user")},
        ]  # come back
    return str(seen)


def is_read(api: str, place: Place, renderer: PromptRenderer) -> bool:
    """Whether two values of the field that are accepted make a difference, or two bodies that are spelled out."""
    spoken = SPOKEN.get(f"{api} {place.path}")
    if spoken is not None:
        return len({_outcome(api, json.dumps(body).encode(), renderer) for body in spoken}) == 2
    for bodies in place.bodies():
        outcomes = {_outcome(api, body_of(api, place, body), renderer) for body in bodies}
        if len(outcomes - {None}) > 1:
            return True
    return False


def _outcome(api: str, body: bytes, renderer: PromptRenderer) -> str | None:
    """What the request does; None if it is refused."""
    try:
        return effect(APIS[api][1](body), renderer)
    except RequestError:
        return None


@pytest.fixture(scope="module")
def found(renderer: PromptRenderer) -> dict[str, bool]:
    """Whether each field is read, by API and path."""
    with pytest.MonkeyPatch.context() as patch:  # grammars are told apart by their text, without being tried
        for module in (chat_module, tool_grammar):
            patch.setattr(module, "compile_grammar", lambda outputs: "")
        return {f"{api} {place.path}": is_read(api, place, renderer) for api, place in PLACES}


def test_every_field_is_read_or_says_why_it_is_ignored(found: dict[str, bool]) -> None:
    unread = []
    for api, place in PLACES:
        path = f"{api} {place.path}"
        parts = [
            read for other, read in found.items() if other.startswith((f"{path}.", f"{path}[", f"{path}<"))
        ]
        if not (found[path] or any(parts) or place.ignored):
            unread.append(path)
    assert unread == []


def test_no_field_that_says_it_is_ignored_is_read(found: dict[str, bool]) -> None:
    ignored = [f"{api} {place.path}" for api, place in PLACES if place.ignored]
    assert len(ignored) > 10 and [path for path in ignored if found[path]] == []


def test_a_field_that_nobody_reads_is_found(renderer: PromptRenderer) -> None:
    page = schema_of(CompletionBody)
    page = {**page, "properties": {**page["properties"], "idle": {"type": "boolean"}}}
    [place] = [place for place in places(page) if place.path == "idle"]
    assert not is_read("completions", place, renderer)


def test_every_field_that_is_ignored_stands_in_the_documentation() -> None:
    told = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text()
    names = {place.path.rpartition(".")[2] for _, place in PLACES if place.ignored}
    assert [name for name in sorted(names) if f"`{name}`" not in told] == []


def test_documents_are_cut_to_the_tokens_that_a_request_gives(renderer: PromptRenderer) -> None:
    document = "The sea is wide and the wind \U0001f30a is strong. " * 20
    body = {"query": "sea", "documents": [document, "short"], "max_tokens_per_doc": 7}
    whole, cut = (
        parse_rerank(json.dumps({**body, "max_tokens_per_doc": most}).encode()).prompts(renderer)
        for most in (0, 7)
    )
    assert renderer.tokenizer is not None
    shown = (cut[0].text or "").partition("<Document>: ")[2].partition("<|im_end|>")[0]
    assert shown and document.startswith(shown) and len(renderer.tokenizer.encode(shown)) <= 7
    assert cut[1] == whole[1] and document in (whole[0].text or "")
    for most in range(1, 40):
        assert document.startswith(renderer.truncate(document, most))
