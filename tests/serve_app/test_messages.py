"""Anthropic's messages: bodies in chat's words, and answers that the client library's own types accept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.errors import EngineDeadError, RequestError
from qwen3_dist.settings import EngineConfig
from qwen3_dist.text.choice import ChoiceDelta, join
from qwen3_dist.text.parsed import ToolCallDelta
from serve_app.apis.messages.answer import MessageAnswer, message_error
from serve_app.apis.messages.request import MessagesRequest, parse_count_tokens, parse_messages
from serve_app.apis.shared.answer import AnswerContext
from serve_app.apis.shared.prompts import Prompt
from serve_app.replica.request_handler import RequestHandler
from tests.serve_app.support import server_events

HELLO = {"role": "user", "content": "Hello!"}
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
TOOL = {"name": "get_weather", "description": "Weather", "input_schema": {"type": "object"}}


def parsed(**fields: Any) -> MessagesRequest:
    body = {"model": "m", "max_tokens": 16, "messages": [HELLO], **fields}
    return parse_messages(json.dumps(body).encode())


def conversation(*messages: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    return parsed(messages=list(messages), **fields).messages


def refusal(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as error:
        parsed(**fields)
    return error.value


def text(value: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **fields}


def test_the_system_prompt_is_a_message_of_paragraphs_without_the_clients_billing_line() -> None:
    assert conversation(HELLO, system="Be brief.")[0] == {"role": "system", "content": "Be brief."}
    blocks = [
        text("x-anthropic-billing-header: cc_version=2; cch=f00;"),
        text("You are an agent.", cache_control={"type": "ephemeral"}),
        text("Be brief."),
    ]
    expected = {"role": "system", "content": "You are an agent.\n\nBe brief."}
    assert conversation(HELLO, system=blocks) == [expected, HELLO]
    assert conversation(HELLO, system="") == [HELLO]


def test_an_agents_turns_become_chat_messages() -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Paris"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [text("18 °C"), text("sunny")]}
    failed = {"type": "tool_result", "tool_use_id": "toolu_2", "content": "no such city", "is_error": True}
    thought = {"type": "thinking", "thinking": "It is in France.", "signature": "s"}
    hidden = {"type": "redacted_thinking", "data": "abc"}
    assert conversation(
        HELLO,
        {"role": "assistant", "content": [thought, hidden, text("I look."), call]},
        {"role": "user", "content": [result, failed, text("And"), text(" now?")]},
    ) == [
        HELLO,
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "It is in France.",
            "tool_calls": [
                {
                    "id": "toolu_1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": {"city": "Paris"}},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "18 °C\nsunny"},
        {"role": "tool", "tool_call_id": "toolu_2", "content": "Error: no such city"},
        {"role": "user", "content": [text("And"), text(" now?")]},
    ]


def test_an_answer_that_the_client_began_is_gone_on_with() -> None:
    assert not parsed().template_kwargs["continue_final_message"]
    begun = parsed(messages=[HELLO, {"role": "assistant", "content": "{"}])
    assert begun.template_kwargs == {"add_generation_prompt": False, "continue_final_message": True}


def test_tools_are_functions_whose_parameters_are_the_input_schema() -> None:
    (tool,) = parsed(tools=[{**TOOL, "type": "custom", "cache_control": {"type": "ephemeral"}}]).tools
    function = {"name": "get_weather", "description": "Weather", "parameters": {"type": "object"}}
    assert tool == {"type": "function", "function": function}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, ("auto", None, True)),
        ({"type": "auto", "disable_parallel_tool_use": True}, ("auto", None, False)),
        ({"type": "any"}, ("required", None, True)),
        ({"type": "tool", "name": "get_weather"}, ("required", "get_weather", True)),
        ({"type": "none"}, ("none", None, True)),
    ],
)
def test_the_choice_of_tools_in_chats_words(choice: dict[str, Any], expected: tuple[Any, ...]) -> None:
    request = parsed(tools=[TOOL], tool_choice=choice)
    assert (request.tool_choice, request.named_tool, request.parallel_tool_calls) == expected


def test_thinking_is_off_unless_the_request_or_the_service_wants_it() -> None:
    assert "enable_thinking" not in parsed().template_kwargs
    assert parsed(thinking={"type": "adaptive"}).template_kwargs["enable_thinking"] is True
    assert parsed(thinking={"type": "disabled"}).template_kwargs["enable_thinking"] is False
    enabled = parsed(thinking={"type": "enabled", "budget_tokens": 1024})
    assert enabled.template_kwargs["enable_thinking"] is True
    assert enabled.params({}).thinking_token_budget == 1024


def test_sampling_fields_and_limits() -> None:
    params = parsed(temperature=0.5, top_p=0.9, top_k=5, stop_sequences=["END"]).params({"top_p": 0.1})
    assert (params.temperature, params.top_p, params.top_k, params.stop) == (0.5, 0.9, 5, ("END",))
    assert params.max_tokens == 16
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "schema": schema}
    structured = parsed(output_config={"format": form, "effort": "high"}).params({}).structured_outputs
    assert structured and structured.json == schema


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"temperature": 1.5}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
        ({"tools": [{"type": 5, "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "f"}}, "tool_choice"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
    ],
)  # fmt: skip
def test_a_bad_field_is_named(fields: dict[str, Any], param: str) -> None:
    assert refusal(**fields).param == param


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RequestError("x"), "invalid_request_error"),
        (RequestError("x", status=401), "authentication_error"),
        (RequestError("x", status=404), "not_found_error"),
        (RequestError("x", status=413), "request_too_large"),
        (RequestError("x", status=429), "rate_limit_error"),
        (EngineDeadError("x"), "overloaded_error"),
        (KeyError("secret"), "api_error"),
    ],
)
def test_errors_have_anthropics_types(error: Exception, kind: str) -> None:
    body = message_error(error)
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert "secret" not in body["error"]["message"]


# What a model may say, as choice deltas: (text, reasoning, tool calls) of each, and how it ended.
THINKS = [("", "It is", ()), ("", " 85.", ()), ("The sum", "", ()), (" is 85.", "", ())]
CALLS = [
    ("I look.", "", ()),
    ("", "", (ToolCallDelta(0, "call_a", "get_weather", '{"ci'),)),
    ("", "", (ToolCallDelta(0, arguments='ty": "Par'),)),
    ("", "", (ToolCallDelta(0, arguments='is"}'), ToolCallDelta(1, "call_b", "now", "{}"))),
]
CUT = [("", "", (ToolCallDelta(0, "call_a", "get_weather", '{"days": 3, "city": "Par'),))]
BROKEN = [("", "", (ToolCallDelta(0, "call_a", "get_weather", "{oops}"),))]


def deltas(said: list[Any], **last: Any) -> list[ChoiceDelta]:
    steps = [ChoiceDelta(0, t, (1,), (), None, reasoning=r, tool_calls=tuple(c)) for t, r, c in said]
    ending = {"finish_reason": "stop", "stop_reason": None, **last}
    return [*steps, ChoiceDelta(0, "", (2,), (), ending["finish_reason"], stop_reason=ending["stop_reason"])]


def answer(max_tokens: int = 100) -> MessageAnswer:
    return MessageAnswer(AnswerContext("m", None, [Prompt([1, 2, 3, 4])]), max_tokens)


def streamed(said: list[ChoiceDelta], max_tokens: int = 100) -> list[dict[str, Any]]:
    form = answer(max_tokens)
    form.count(said[0])
    events = form.begin()
    assert b'"output_tokens":0' in events  # however many tokens come with the first part
    for number, delta in enumerate(said):
        if number:
            form.count(delta)
        events += form.delta(delta)
    return server_events(events + form.end())


def accumulated(events: list[dict[str, Any]]) -> Message:
    """What the client library makes of a stream."""
    snapshot, buffers = None, {}
    for event in events:
        checked = EVENT.validate_python(event)
        snapshot = accumulate_event(event=checked, current_snapshot=snapshot, json_bufs=buffers)
    assert snapshot is not None
    return snapshot


def whole(said: list[ChoiceDelta], max_tokens: int = 100) -> Message:
    form = answer(max_tokens)
    for delta in said:
        form.count(delta)
    return Message.model_validate(json.loads(json.dumps(form.full_response([join(said)]))))


def blocks(message: Message) -> list[Any]:
    shown = [block.to_dict() for block in message.content]
    return [{k: v for k, v in block.items() if k not in ("signature", "id")} for block in shown]


ENDINGS = [
    (deltas(THINKS), "end_turn"),
    (deltas(THINKS, stop_reason="."), "stop_sequence"),
    (deltas(THINKS, stop_reason=7), "end_turn"),
    (deltas(THINKS, finish_reason="length"), "max_tokens"),
    (deltas(CALLS, finish_reason="tool_calls"), "tool_use"),
    (deltas(CUT, finish_reason="length"), "max_tokens"),
    (deltas([]), "end_turn"),
]


@pytest.mark.parametrize(("said", "stop_reason"), ENDINGS)
def test_the_streamed_message_is_the_whole_one(said: list[ChoiceDelta], stop_reason: str) -> None:
    max_tokens = len(said)
    one, other = accumulated(streamed(said, max_tokens)), whole(said, max_tokens)
    assert blocks(one) == blocks(other)
    assert one.stop_reason == other.stop_reason == stop_reason
    assert one.stop_sequence == other.stop_sequence == ("." if stop_reason == "stop_sequence" else None)
    assert one.usage.to_dict() == other.usage.to_dict()
    assert one.usage.output_tokens == len(said) and one.usage.input_tokens == 4


def test_thinking_text_and_calls_are_blocks_in_their_order() -> None:
    thought = {"type": "thinking", "thinking": "It is 85."}
    assert blocks(whole(deltas(THINKS))) == [thought, text("The sum is 85.")]
    assert blocks(whole(deltas(CALLS))) == [
        text("I look."),
        {"type": "tool_use", "name": "get_weather", "input": {"city": "Paris"}},
        {"type": "tool_use", "name": "now", "input": {}},
    ]
    assert blocks(whole(deltas(BROKEN)))[0]["input"] == {"INVALID_JSON": "{oops}"}
    assert blocks(whole(deltas(CUT))) == [{"type": "tool_use", "name": "get_weather", "input": {"days": 3}}]


def test_white_space_between_calls_is_no_text_block() -> None:
    spaced = [(text or "\n", reasoning, calls) for text, reasoning, calls in CALLS[1:]]
    assert blocks(accumulated(streamed(deltas(spaced)))) == blocks(whole(deltas(CALLS[1:])))
    assert blocks(accumulated(streamed(deltas([("\n\n", "", ()), *CUT])))) == blocks(whole(deltas(CUT)))
    assert blocks(accumulated(streamed(deltas([("\n", "", ()), (" x", "", ())])))) == [text("\n x")]


def test_each_block_is_begun_signed_and_ended_before_the_next() -> None:
    kinds = [
        (event["type"], event.get("index"), event.get("delta", {}).get("type"))
        for event in streamed(deltas(THINKS[1:3]))
    ]
    assert kinds == [
        ("message_start", None, None),
        ("content_block_start", 0, None),
        ("content_block_delta", 0, "thinking_delta"),
        ("content_block_delta", 0, "signature_delta"),
        ("content_block_stop", 0, None),
        ("content_block_start", 1, None),
        ("content_block_delta", 1, "text_delta"),
        ("content_block_stop", 1, None),
        ("message_delta", None, None),
        ("message_stop", None, None),
    ]


def test_an_answer_that_fills_the_context_says_so() -> None:
    said = deltas(THINKS, finish_reason="length")
    assert whole(said, max_tokens=32_000).stop_reason == "model_context_window_exceeded"


def test_a_stream_that_breaks_off_ends_with_an_error_event() -> None:
    (event,) = server_events(answer().fail(EngineDeadError("rank 1 died")))
    assert event == {"type": "error", "error": {"type": "overloaded_error", "message": "rank 1 died"}}


@pytest.fixture(scope="module")
def handler() -> Iterator[RequestHandler]:
    engine = AsyncEngine(EngineConfig(device="cpu", dtype="float32", num_blocks=256))
    yield RequestHandler(engine, "m", {})
    engine.shutdown()


async def stream(handler: RequestHandler, request: MessagesRequest) -> list[dict[str, Any]]:
    return server_events(b"".join([item async for item in handler.stream(request)]))


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 12},
        {"max_tokens": 100_000, "stop_sequences": ["!"]},
        {"thinking": {"type": "adaptive"}, "max_tokens": 40},
        {"messages": [HELLO, {"role": "assistant", "content": "I am"}]},
        {"system": [text("Be brief.")]},
        {"tools": [TOOL]},
    ],
)
def test_a_model_answers_streamed_as_unstreamed(handler: RequestHandler, fields: dict[str, Any]) -> None:
    request = parsed(temperature=0, **fields)
    one = accumulated(asyncio.run(stream(handler, request)))
    other = Message.model_validate(json.loads(asyncio.run(handler.respond(request))))
    assert blocks(one) == blocks(other) and blocks(one)
    assert (one.stop_reason, one.stop_sequence) == (other.stop_reason, other.stop_sequence)
    assert one.usage.output_tokens == other.usage.output_tokens > 0


def test_tokens_are_counted_as_the_message_would_be_charged(handler: RequestHandler) -> None:
    fields = {"messages": [HELLO], "system": "Be brief.", "tools": [TOOL]}
    counted = asyncio.run(handler.respond(parse_count_tokens(json.dumps({"model": "m", **fields}).encode())))
    message = json.loads(asyncio.run(handler.respond(parsed(max_tokens=1, **fields))))
    usage = message["usage"]
    charged = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert json.loads(counted) == {"input_tokens": charged}


def test_a_prompt_longer_than_the_context_is_refused(handler: RequestHandler) -> None:
    with pytest.raises(RequestError, match="4096"):
        asyncio.run(handler.respond(parsed(messages=[{"role": "user", "content": "sea " * 5000}])))
