"""Thoughts and tool calls in chats, told from text by a real engine's handler, streamed and not."""

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
from serve_app.replica.request_handler import RequestHandler

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "get_weather", "description": "Weather of a city", "parameters": CITY}
TOOL = {"type": "function", "function": FUNCTION}
WEATHER: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
    "tools": [TOOL],
}
SUM: dict[str, Any] = {"messages": [{"role": "user", "content": "What is 47 + 38?"}]}


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncEngine]:
    engine = AsyncEngine(EngineConfig(device="cpu", dtype="float32", num_blocks=256))
    yield engine
    engine.shutdown()


def answer(engine: AsyncEngine, tool_calls: Any = None, **fields: Any) -> dict[str, Any]:
    """The whole answer's only choice, and `usage` in it."""
    body = json.dumps({"temperature": 0, "max_tokens": 160, **fields}).encode()
    handler = RequestHandler(engine, "m", {}, tool_calls=tool_calls)
    whole = json.loads(asyncio.run(handler.respond(parse_chat(body))))
    return {**whole["choices"][0], "usage": whole["usage"]}


def chunks(engine: AsyncEngine, **fields: Any) -> list[dict[str, Any]]:
    body = json.dumps({"temperature": 0, "max_tokens": 160, "stream": True, **fields}).encode()

    async def collect() -> bytes:
        stream = RequestHandler(engine, "m", {}).stream(parse_chat(body))
        return b"".join([item async for item in stream])

    events = asyncio.run(collect()).decode().removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: "))["choices"][0] for event in events[:-1]]


def test_a_call_has_a_name_and_arguments_and_is_no_content(engine: AsyncEngine) -> None:
    choice = answer(engine, **WEATHER, enable_thinking=False)
    [call] = choice["message"]["tool_calls"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}


def test_streamed_parts_of_a_call_join_to_the_unstreamed_one(engine: AsyncEngine) -> None:
    shown = chunks(engine, **WEATHER)
    whole = answer(engine, **WEATHER)
    [call] = whole["message"]["tool_calls"]
    first, *rest = (part for c in shown for part in c["delta"].get("tool_calls", []))
    assert first["function"]["name"] == "get_weather" and first["id"] and len(rest) > 1
    assert all("id" not in part and "name" not in part["function"] for part in rest)
    joined = "".join(part["function"]["arguments"] for part in (first, *rest))
    assert joined == call["function"]["arguments"]
    thought = "".join(c["delta"].get("reasoning_content", "") for c in shown)
    assert thought == whole["message"]["reasoning_content"] != ""
    assert shown[-1]["finish_reason"] == whole["finish_reason"] == "tool_calls"
    assert not any(c["delta"].get("content") for c in shown)


def test_where_no_call_is_wanted_there_is_none(engine: AsyncEngine) -> None:
    choice = answer(engine, **WEATHER, tool_choice="none", enable_thinking=False)
    assert choice["message"]["content"] and "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "stop"


def test_a_call_in_the_other_form_is_one_of_tools_that_there_are(engine: AsyncEngine) -> None:
    [call] = answer(engine, "xml", **WEATHER, enable_thinking=False)["message"]["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}


@pytest.mark.parametrize("max_tokens", [1, 2, 4, 6])
def test_a_required_call_that_is_cut_off_early_shows_nothing(engine: AsyncEngine, max_tokens: int) -> None:
    asked = {**WEATHER, "tool_choice": "required", "enable_thinking": False, "max_tokens": max_tokens}
    choice = answer(engine, **asked)
    assert (choice["message"]["content"] or "", choice["finish_reason"]) == ("", "length")
    assert "tool_calls" not in choice["message"]
    assert not any(c["delta"].get("content") for c in chunks(engine, **asked))


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('<tool_call>{"name":"get_weather","parameters":{"city":"Bonn"}}</tool_call>', {"city": "Bonn"}),
        ("<tool_call>{'name': 'get_weather', 'arguments': {'city': None}}}</tool_call>", {"city": None}),
        ("<tool_call><function=get_weather><parameter=city>Bonn</function></tool_call>", {"city": "Bonn"}),
    ],
)
def test_calls_as_models_write_them_are_calls(
    engine: AsyncEngine, text: str, arguments: dict[str, Any]
) -> None:
    asked = {**WEATHER, "enable_thinking": False, "structured_outputs": {"choice": [text]}}
    choice = answer(engine, **asked)
    [call] = choice["message"]["tool_calls"]
    assert (choice["message"]["content"], json.loads(call["function"]["arguments"])) == (None, arguments)
    streamed = chunks(engine, **asked)
    parts = [part["function"] for c in streamed for part in c["delta"].get("tool_calls", [])]
    assert "".join(part["arguments"] for part in parts) == call["function"]["arguments"]
    assert not any(c["delta"].get("content") for c in streamed)


def test_thoughts_are_apart_from_content_and_counted(engine: AsyncEngine) -> None:
    choice = answer(engine, **SUM)
    assert choice["message"]["content"] == "47 + 38 = 85"
    thought = choice["message"]["reasoning"]
    assert thought == choice["message"]["reasoning_content"] and thought.startswith("47 + 38\n")
    assert engine.tokenizer is not None
    expected = len(engine.tokenizer.encode(f"\n{thought}\n"))
    assert choice["usage"]["completion_tokens_details"]["reasoning_tokens"] == expected


def test_thinking_that_is_off_leaves_content_alone(engine: AsyncEngine) -> None:
    choice = answer(engine, **SUM, enable_thinking=False)
    assert choice["message"] == {"role": "assistant", "content": choice["message"]["content"]}
    assert choice["message"]["content"] and choice["finish_reason"] == "stop"
    assert choice["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


def test_thinking_that_is_cut_off_is_all_there_is(engine: AsyncEngine) -> None:
    choice = answer(engine, **SUM, max_tokens=12)
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", None)
    assert choice["message"]["reasoning"].startswith("47 + 38")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
@pytest.mark.parametrize("thinking", [False, True])
def test_a_call_that_is_required_is_made(engine: AsyncEngine, choice: Any, thinking: bool) -> None:
    asked = {**SUM, "tools": [TOOL], "tool_choice": choice, "enable_thinking": thinking}
    found = answer(engine, **asked, parallel_tool_calls=False)
    [call] = found["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather" and "city" in json.loads(call["function"]["arguments"])
    assert found["message"]["content"] is None
    assert found["finish_reason"] == ("tool_calls" if choice == "required" else "stop")
    assert bool(found["message"].get("reasoning")) == thinking
    streamed = chunks(engine, **asked, parallel_tool_calls=False)
    parts = [part["function"] for c in streamed for part in c["delta"].get("tool_calls", [])]
    assert "".join(part.get("arguments", "") for part in parts) == call["function"]["arguments"]


def test_a_call_that_is_required_in_xml_is_made(engine: AsyncEngine) -> None:
    found = answer(engine, "xml", **WEATHER, tool_choice="required", parallel_tool_calls=False)
    [call] = found["message"]["tool_calls"]
    # The bundled model does not know the form, and writes text to the limit.
    assert call["function"]["name"] == "get_weather" and found["finish_reason"] == "length"
    assert call["function"]["arguments"].startswith('{"city": "')


def test_a_strict_tools_arguments_follow_its_schema(engine: AsyncEngine) -> None:
    towns = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
    strict = {"type": "function", "function": {**FUNCTION, "parameters": towns, "strict": True}}
    for enable_thinking in (False, True):
        asked = {**WEATHER, "tools": [strict], "enable_thinking": enable_thinking}
        [call] = answer(engine, **asked)["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"])["city"] in ("Oslo", "Rome")
    assert "85" in answer(engine, **SUM, tools=[strict])["message"]["content"]


def test_an_answer_in_a_form_may_still_be_a_call(engine: AsyncEngine) -> None:
    number = {"sum": {"type": "integer"}}
    schema = {"type": "object", "properties": number, "required": ["sum"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}}
    choice = answer(engine, **WEATHER, enable_thinking=False, response_format=form)
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Paris"}'
    told = answer(engine, **SUM, tools=[TOOL], tool_choice="none", response_format=form)
    assert isinstance(json.loads(told["message"]["content"])["sum"], int)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"function": {"name": "f", "parameters": {"type": "sausage"}}}]}, "tools"),
        ({"tools": [{"function": {"name": "f", "strict": True, "parameters": {"type": "x"}}}]}, "tools"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
            "response_format",
        ),
        (
            {
                "tool_choice": "auto",
                "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}},
            },
            "response_format",
        ),
        ({"tool_choice": "none", "guided_regex": "("}, "guided_regex"),
        ({"tool_choice": "none", "structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"guided_regex": "a"}, "guided_regex"),
    ],
)
def test_a_form_that_cannot_be_is_named_by_the_clients_field(
    engine: AsyncEngine, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        answer(engine, **{**WEATHER, "tool_choice": "required", **fields})
    assert caught.value.param == param and str(caught.value).startswith(param)
