"""Answers that must have a form, by a real engine's handler: after thoughts, with marks as text, in all APIs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.errors import RequestError
from qwen3_dist.settings import EngineConfig
from serve_app.apis.chat.request import parse_chat
from serve_app.apis.messages.request import parse_messages
from serve_app.apis.responses.request import parse_responses
from serve_app.replica.request_handler import RequestHandler

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello!"}]}
NO_THOUGHT = {"chat_template_kwargs": {"enable_thinking": False}}
COLOUR = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"], "type": "string"}, "ok": {"type": "boolean"}},
    "required": ["colour", "ok"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "S", "schema": COLOUR}}
FIVE = {
    "type": "object",
    "properties": {"n": {"const": 5}},
    "required": ["n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncEngine]:
    engine = AsyncEngine(EngineConfig(device="cpu", dtype="float32", num_blocks=512))
    yield engine
    engine.shutdown()


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def answers(engine: AsyncEngine, requests: list[Any]) -> list[dict[str, Any]]:
    """The whole answers to parsed requests that run side by side."""
    handler = RequestHandler(engine, "m", {})

    async def respond() -> list[bytes]:
        return await asyncio.gather(*(handler.respond(request) for request in requests))

    return [json.loads(answer) for answer in asyncio.run(respond())]


def chat(engine: AsyncEngine, **fields: Any) -> dict[str, Any]:
    body = {"temperature": 0, "max_tokens": 150, **HELLO, **fields}
    [answer] = answers(engine, [parse_chat(json.dumps(body).encode())])
    choice: dict[str, Any] = answer["choices"][0]
    return choice


@pytest.mark.parametrize("tools", [[], [tool("ping")]])
@pytest.mark.parametrize("thoughts", [{}, {"thinking_token_budget": 3}])
def test_json_follows_thoughts(engine: AsyncEngine, tools: list[Any], thoughts: dict[str, Any]) -> None:
    sampled = [{"temperature": 0}, *({"temperature": 0.6, "seed": seed} for seed in range(4))]
    asked = {**HELLO, **thoughts, "max_tokens": 400, "tools": tools, "response_format": FORMAT}
    bodies = [json.dumps({**asked, **sampling}).encode() for sampling in sampled]
    for answer in answers(engine, [parse_chat(body) for body in bodies]):
        [choice] = answer["choices"]
        if choice["finish_reason"] == "tool_calls":
            assert tools and choice["message"]["tool_calls"][0]["function"]["arguments"] == "{}"
        else:
            assert choice["finish_reason"] == "stop" and choice["message"]["reasoning"]
            said = json.loads(choice["message"]["content"])
            assert said.keys() == COLOUR["properties"].keys() and said["colour"] in ("red", "blue")


def test_json_follows_thoughts_in_responses_and_messages(engine: AsyncEngine) -> None:
    asked = {"input": "Hello!", "temperature": 0, "max_output_tokens": 400}
    text = {"format": {"type": "json_schema", "name": "S", "schema": COLOUR, "strict": True}}
    said = {**HELLO, "temperature": 0, "max_tokens": 400, "thinking": {"type": "adaptive"}}
    config = {"format": {"type": "json_schema", "schema": COLOUR}}
    response, message = answers(
        engine,
        [
            parse_responses(json.dumps({**asked, "text": text}).encode()),
            parse_messages(json.dumps({**said, "output_config": config}).encode()),
        ],
    )
    assert response["status"] == "completed" and message["stop_reason"] == "end_turn"
    for found in (response["output"][-1]["content"][0]["text"], message["content"][-1]["text"]):
        assert json.loads(found).keys() == COLOUR["properties"].keys()


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ({"json": {"properties": {"a": {"enum": ["<|im_end|>"]}}, "required": ["a"]}}, '{"a": "<|im_end|>"}'),
        ({"json": {"const": "<tool_call>"}}, '"<tool_call>"'),
        ({"json": {"properties": {"<think>": {"const": 1}}, "required": ["<think>"]}}, '{"<think>": 1}'),
        ({"choice": ["<tool_call>"]}, "<tool_call>"),
        ({"choice": ["<|im_end|>"]}, "<|im_end|>"),
        ({"choice": ["<think>x"]}, "<think>x"),
        ({"regex": "<tool_call>x"}, "<tool_call>x"),
        ({"regex": "Say <\\|im_end\\|> now"}, "Say <|im_end|> now"),
        ({"grammar": 'start: "<tool_call>" /ab/'}, "<tool_call>ab"),
    ],
)
@pytest.mark.parametrize("thinks", [False, True])
def test_marks_are_content(engine: AsyncEngine, form: dict[str, Any], text: str, thinks: bool) -> None:
    if "json" in form and isinstance(form["json"].get("properties"), dict):
        form = {"json": {**form["json"], "type": "object", "additionalProperties": False}}
    thoughts = {"logit_bias": think_bias(engine)} if thinks else NO_THOUGHT
    choice = chat(engine, structured_outputs=form, **thoughts)
    assert choice["finish_reason"] == "stop"
    said = choice["message"]["content"]
    if text.startswith("{"):
        assert json.loads(said) == json.loads(text)
    else:
        assert said == text


def think_bias(engine: AsyncEngine) -> dict[str, float]:
    """Keeps the model from thinking, though it may: the form begins at once."""
    assert engine.tokenizer is not None
    return {str(engine.tokenizer.token_id("<think>")): -100}


@pytest.mark.parametrize("mark", ["<think>", "<tool_call>", "</tool_call>", "<|im_end|>"])
def test_marks_are_arguments(engine: AsyncEngine, mark: str) -> None:
    schema = {**FIVE, "properties": {"n": {"enum": [mark]}}}
    choice = chat(engine, tools=[tool("f", parameters=schema)], tool_choice="required", **NO_THOUGHT)
    calls = choice["message"]["tool_calls"]
    assert {call["function"]["arguments"] for call in calls} == {json.dumps({"n": mark})}
    assert choice["message"]["content"] is None


def test_json_with_marks_comes_whole_beside_tools(engine: AsyncEngine) -> None:
    schema = {**FIVE, "properties": {"n": {"enum": ["<tool_call> and </tool_call>"]}}}
    format_ = {"type": "json_schema", "json_schema": {"name": "S", "schema": schema}}
    no_call = (
        {"logit_bias": {str(engine.tokenizer.token_id("<tool_call>")): -100}} if engine.tokenizer else {}
    )
    choice = chat(engine, tools=[tool("f")], response_format=format_, **NO_THOUGHT, **no_call)
    assert json.loads(choice["message"]["content"]) == {"n": "<tool_call> and </tool_call>"}
    assert "tool_calls" not in choice["message"]


def test_strict_tools_hold_in_all_apis(engine: AsyncEngine) -> None:
    function = {"name": "f", "parameters": FIVE, "strict": True}
    sampled = {"temperature": 1, "max_tokens": 200}
    requests: list[Any] = []
    for name in ("auto", "any", "tool"):
        named = {"name": "f"} if name == "tool" else {}
        body = {**HELLO, **sampled, "tool_choice": {"type": name, **named}}
        offered = {"name": "f", "input_schema": FIVE, "strict": True}
        requests.append(parse_messages(json.dumps({**body, "tools": [offered]}).encode()))
    body = {"input": "Hello!", "temperature": 1, "max_output_tokens": 200, "reasoning": {"effort": "none"}}
    body |= {"tools": [{"type": "function", **function}], "tool_choice": "required"}
    requests.append(parse_responses(json.dumps(body).encode()))
    *messages, response = answers(engine, requests)
    inputs = [block["input"] for m in messages for block in m["content"] if block["type"] == "tool_use"]
    assert len(inputs) >= 2 and all(given == {"n": 5} for given in inputs)
    calls = [item for item in response["output"] if item["type"] == "function_call"]
    assert calls and all(json.loads(call["arguments"]) == {"n": 5} for call in calls)


def test_the_schema_of_json_object_holds(engine: AsyncEngine) -> None:
    schema = {"properties": {"k": {"const": 7}}, "required": ["k"], "additionalProperties": False}
    choice = chat(engine, response_format={"type": "json_object", "schema": schema}, **NO_THOUGHT)
    assert json.loads(choice["message"]["content"]) == {"k": 7}


@pytest.mark.parametrize("parameters", [{}, {"parameters": None}])
def test_a_tool_without_parameters_is_called_with_none(
    engine: AsyncEngine, parameters: dict[str, Any]
) -> None:
    body = {**HELLO, "tools": [tool("ping", **parameters)], "tool_choice": "required", **NO_THOUGHT}
    body |= {"temperature": 1, "max_tokens": 60}
    seeds = [parse_chat(json.dumps({**body, "seed": seed}).encode()) for seed in range(6)]
    for answer in answers(engine, seeds):
        calls = answer["choices"][0]["message"]["tool_calls"]
        assert {call["function"]["arguments"] for call in calls[:-1]} <= {"{}"}
        assert calls[-1]["function"]["name"] == "ping"


def test_a_named_tool_is_called_once(engine: AsyncEngine) -> None:
    named = {"type": "function", "function": {"name": "f"}}
    asked = {
        "tools": [tool("f", parameters=FIVE), tool("g")],
        "tool_choice": named,
        "temperature": 1,
        **NO_THOUGHT,
    }
    bodies = [json.dumps({**HELLO, **asked, "seed": seed, "max_tokens": 200}).encode() for seed in range(5)]
    for answer in answers(engine, [parse_chat(body) for body in bodies]):
        [call] = answer["choices"][0]["message"]["tool_calls"]
        assert call["function"] == {"name": "f", "arguments": '{"n": 5}'}
        assert answer["choices"][0]["finish_reason"] == "stop"


def test_what_cannot_be_held_is_left_out_unless_it_is_insisted_on(engine: AsyncEngine) -> None:
    schema = {
        **FIVE,
        "propertyNames": {"pattern": "^n$"},
        "properties": {"n": {"enum": [[1]], "uniqueItems": True}},
    }
    loose = {"type": "json_schema", "json_schema": {"name": "S", "schema": schema}}
    choice = chat(engine, response_format=loose, **NO_THOUGHT)
    assert json.loads(choice["message"]["content"]) == {"n": [1]}
    strict = {"type": "json_schema", "json_schema": {"name": "S", "schema": schema, "strict": True}}
    for asked in (
        {"response_format": strict},
        {"structured_outputs": {"json": schema}},
        {"tools": [tool("f", parameters=schema, strict=True)]},
    ):
        with pytest.raises(RequestError, match="propertyNames"):
            chat(engine, **asked, **NO_THOUGHT)
