"""Thoughts and tool calls in chats, told from text by a real engine's handler, streamed and not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.settings import EngineConfig
from serve_app.handlers import RequestHandler
from serve_app.protocol.chat import parse_chat

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


def test_a_form_that_is_set_goes_before_the_templates(engine: AsyncEngine) -> None:
    message = answer(engine, "xml", **WEATHER, enable_thinking=False)["message"]
    assert message["content"].startswith("<tool_call>") and "tool_calls" not in message


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
