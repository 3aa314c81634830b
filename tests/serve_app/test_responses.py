"""OpenAI's responses: bodies in chat's words, and answers that the client library's own types accept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.errors import EngineDeadError, RequestError
from qwen3_dist.settings import EngineConfig
from qwen3_dist.text.choice import ChoiceDelta, join
from qwen3_dist.text.parsed import ToolCallDelta
from serve_app.apis.responses.answer import ResponseAnswer, next_error_event
from serve_app.apis.responses.request import ResponsesRequest, parse_responses
from serve_app.apis.shared.answer import AnswerContext
from serve_app.apis.shared.prompts import Prompt
from serve_app.replica.request_handler import RequestHandler
from tests.serve_app.support import server_events

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: Any = {"type": "function", "name": "get_weather", "parameters": CITY}
USER = {"role": "user", "content": "Hello!"}


def parsed(**fields: Any) -> ResponsesRequest:
    return parse_responses(json.dumps({"model": "m", "input": "Hello!", **fields}).encode())


def conversation(*items: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    return parsed(input=list(items), **fields).messages


def refusal(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as error:
        parsed(**fields)
    return error.value


def said_by_assistant(text: str) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": []}
    return {
        "type": "message",
        "id": "msg_1",
        "role": "assistant",
        "status": "completed",
        "content": [part],
    }


def call(call_id: str) -> dict[str, Any]:
    return {
        "type": "function_call",
        "call_id": call_id,
        "name": "get_weather",
        "arguments": '{"city": "Paris"}',
    }


def test_input_is_text_or_messages_with_instructions_ahead() -> None:
    assert parsed().messages == [USER]
    assert parsed(instructions="Be brief.").messages[0] == {"role": "system", "content": "Be brief."}
    parts = [{"type": "input_text", "text": "Hel"}, {"type": "input_text", "text": "lo!"}]
    assert conversation({"type": "message", "role": "user", "content": parts}) == [USER]
    assert conversation({"role": "developer", "content": "Be brief."}, USER)[0]["role"] == "system"


def test_the_items_of_a_turn_are_one_chat_message() -> None:
    thought = {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "Hm."}],
    }
    output = {"type": "function_call_output", "call_id": "a", "output": "18 °C"}
    other = {**output, "call_id": "b", "output": [{"type": "input_text", "text": "19 °C"}]}
    turns = conversation(
        USER, thought, said_by_assistant("I look."), call("a"), call("b"), output, other, thought
    )
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool", "tool", "assistant"]
    assert (turns[1]["reasoning_content"], turns[1]["content"]) == ("Hm.", "I look.")
    assert [c["id"] for c in turns[1]["tool_calls"]] == ["a", "b"]
    assert turns[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
    assert turns[3] == {"role": "tool", "tool_call_id": "b", "content": "19 °C"}


def test_what_follows_a_turns_calls_is_a_turn_of_its_own() -> None:
    turns = conversation(USER, call("a"), said_by_assistant("Well."), said_by_assistant("Done."))
    assert [turn["content"] for turn in turns] == ["Hello!", "", "Well.", "Done."]


def test_fields_in_chats_words() -> None:
    request = parsed(
        temperature=0.5, top_p=0.9, max_output_tokens=7, stream=True, tools=[{**TOOL, "strict": True}],
        tool_choice={"type": "function", "name": "get_weather"}, parallel_tool_calls=False,
        reasoning={"effort": "none"},
    )  # fmt: skip
    params = request.params({})
    assert (params.temperature, params.top_p, params.max_tokens, request.stream) == (0.5, 0.9, 7, True)
    function = {"name": "get_weather", "parameters": CITY, "strict": True}
    assert request.tools == [{"type": "function", "function": function}]
    assert (request.tool_choice, request.named_tool) == ("required", "get_weather")
    assert not request.parallel_tool_calls and request.template_kwargs["enable_thinking"] is False
    assert parsed(reasoning={"effort": "high", "summary": "auto"}).template_kwargs["enable_thinking"] is True


def test_the_texts_format_is_a_structure() -> None:
    def structure(form: dict[str, Any]) -> Any:
        return parsed(text={"format": form, "verbosity": "low"}).params({}).structured_outputs

    schema = {"type": "object"}
    assert structure({"type": "text"}) is None
    assert structure({"type": "json_object"}).json_object
    assert structure({"type": "json_schema", "name": "n", "schema": schema, "strict": True}).json == schema


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"type": "telepathy_call"}]}, "input[0].type"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"top_logprobs": -1}, "top_logprobs"),
        ({"include": [5]}, "include[0]"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"tools": [{"type": 5}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"truncation": "middle"}, "truncation"),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, Any], param: str) -> None:
    assert refusal(**fields).param == param


def test_what_asks_for_nothing_that_is_not_built_is_ignored() -> None:
    ignored = {
        "background": False,
        "store": True,
        "include": ["reasoning.encrypted_content"],
        "service_tier": "auto",
    }
    assert parsed(**ignored, previous_response_id=None, prompt_cache_key="k") == parsed()


# What a model may say, as choice deltas: (text, reasoning, tool calls) of each, and how it ended.
THINKS = [("", "It is", ()), ("", " 85.", ()), ("The sum", "", ()), (" is 85.", "", ())]
CALLS = [
    ("I look.", "", ()),
    ("", "", (ToolCallDelta(0, "call_a", "get_weather", '{"ci'),)),
    ("", "", (ToolCallDelta(0, arguments='ty": "Paris"}'), ToolCallDelta(1, "call_b", "now", "{}"))),
]


def deltas(said: list[Any], finish_reason: str = "stop") -> list[ChoiceDelta]:
    steps = [ChoiceDelta(0, t, (1,), (), None, reasoning=r, tool_calls=tuple(c)) for t, r, c in said]
    return [*steps, ChoiceDelta(0, "", (2,), (), finish_reason)]


def answer(**fields: Any) -> ResponseAnswer:
    form = parsed(**fields).answer(AnswerContext("m", None, [Prompt([1, 2, 3, 4])]))
    assert isinstance(form, ResponseAnswer)
    return form


def streamed(said: list[ChoiceDelta]) -> list[dict[str, Any]]:
    form = answer(tools=[TOOL])
    events = form.begin()
    for delta in said:
        form.count(delta)
        events += form.delta(delta)
    return server_events(events + form.end())


def accumulated(events: list[dict[str, Any]]) -> Response:
    """What the client library makes of a stream: its own snapshot, which must be the server's last word."""
    state: ResponseStreamState[Any] = ResponseStreamState(input_tools=[TOOL], text_format=omit)
    checked = [EVENT.validate_python(event) for event in events]
    assert [event.sequence_number for event in checked] == list(range(len(checked)))
    for event in checked:
        state.handle_event(event)
    last: Response = checked[-1].response
    return last


def whole(said: list[ChoiceDelta]) -> Response:
    form = answer(tools=[TOOL])
    for delta in said:
        form.count(delta)
    return Response.model_validate(json.loads(json.dumps(form.full_response([join(said)]))))


def items(response: Response) -> list[Any]:
    return [{k: v for k, v in item.to_dict().items() if k != "id"} for item in response.output]


@pytest.mark.parametrize("finish_reason", ["stop", "length"])
@pytest.mark.parametrize("said", [THINKS, CALLS, THINKS[:2], CALLS[1:2], []])
def test_the_streamed_response_is_the_whole_one(said: list[Any], finish_reason: str) -> None:
    steps = deltas(said, finish_reason)
    one, other = accumulated(streamed(steps)), whole(steps)
    assert items(one) == items(other)
    assert one.status == other.status == ("incomplete" if finish_reason == "length" else "completed")
    details = one.incomplete_details
    assert (details and details.reason) == ("max_output_tokens" if finish_reason == "length" else None)
    assert one.usage and one.usage == other.usage and one.usage.output_tokens == len(steps)


def test_reasoning_text_and_calls_are_items_in_their_order() -> None:
    response = whole(deltas(THINKS))
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert items(response)[0]["content"] == [{"type": "reasoning_text", "text": "It is 85."}]
    assert response.output_text == "The sum is 85."
    response = whole(deltas(CALLS, "tool_calls"))
    assert [item.type for item in response.output] == ["message", "function_call", "function_call"]
    assert items(response)[1:] == [
        {"type": "function_call", "call_id": i, "name": n, "arguments": a, "status": "completed"}
        for i, n, a in (("call_a", "get_weather", '{"city": "Paris"}'), ("call_b", "now", "{}"))
    ]


def test_the_deltas_of_a_stream_add_up_to_what_is_done() -> None:
    events = streamed(deltas(CALLS))
    for kind, field in (("output_text", "text"), ("function_call_arguments", "arguments")):
        done = [event[field] for event in events if event["type"] == f"response.{kind}.done"]
        parts = [event["delta"] for event in events if event["type"] == f"response.{kind}.delta"]
        assert "".join(parts) == "".join(done)


def test_an_item_that_the_limit_cut_is_incomplete() -> None:
    assert [item["status"] for item in items(whole(deltas(THINKS, "length")))] == ["completed", "incomplete"]
    assert [item["status"] for item in items(accumulated(streamed(deltas(THINKS, "length"))))] == [
        "completed",
        "incomplete",
    ]


def test_the_answer_repeats_what_was_asked() -> None:
    form = answer(
        instructions="Be brief.", metadata={"a": "b"}, tools=[TOOL], tool_choice="none", user="u", store=True
    )
    response = Response.model_validate(form.full_response(deltas([])))
    assert (response.instructions, response.metadata, response.tool_choice, response.user) == (
        "Be brief.",
        {"a": "b"},
        "none",
        "u",
    )
    assert response.tools[0].type == "function" and response.to_dict()["store"] is False


def test_a_stream_that_breaks_off_says_so_and_keeps_what_was_shown() -> None:
    form = answer()
    events = form.begin() + form.delta(deltas(THINKS)[0]) + form.fail(EngineDeadError("rank 1 died"))
    *_, error, failed = (EVENT.validate_python(event) for event in server_events(events))
    assert (error.type, error.message) == ("error", "rank 1 died")
    assert failed.type == "response.failed" and failed.response.error.message == "rank 1 died"
    assert failed.sequence_number == error.sequence_number + 1


@pytest.mark.parametrize("is_empty", [False, True])
def test_an_error_event_of_the_ingress_continues_the_sequence_numbers(is_empty: bool) -> None:
    form = answer(metadata={"a": 'data: {"type":"x","sequence_number":99}', "b": "\n"})
    sent = b"" if is_empty else form.begin() + form.delta(deltas(THINKS)[0])
    numbers = [each["sequence_number"] for each in server_events(sent)]
    (lost,) = server_events(next_error_event(EngineDeadError("the replica was lost"), sent))
    assert EVENT.validate_python(lost).message == "the replica was lost"
    assert lost["sequence_number"] == len(numbers) and numbers == list(range(len(numbers)))


@pytest.fixture(scope="module")
def handler() -> Iterator[RequestHandler]:
    engine = AsyncEngine(EngineConfig(device="cpu", dtype="float32", num_blocks=256))
    yield RequestHandler(engine, "m", {})
    engine.shutdown()


async def stream(handler: RequestHandler, request: ResponsesRequest) -> list[dict[str, Any]]:
    return server_events(b"".join([item async for item in handler.stream(request)]))


@pytest.mark.parametrize(
    "fields",
    [
        {"max_output_tokens": 12},
        {"reasoning": {"effort": "high"}, "max_output_tokens": 40},
        {"input": "What is the weather in Paris?", "tools": [TOOL], "reasoning": {"effort": "none"}},
    ],
)
def test_a_model_answers_streamed_as_unstreamed(handler: RequestHandler, fields: dict[str, Any]) -> None:
    request = parsed(temperature=0, **fields)
    one = accumulated(asyncio.run(stream(handler, request)))
    other = Response.model_validate(json.loads(asyncio.run(handler.respond(request))))
    assert [{**item, "call_id": ""} for item in items(one)] == [
        {**item, "call_id": ""} for item in items(other)
    ]
    assert items(one) and one.status == other.status


def test_too_long_an_output_is_refused_in_the_clients_words(handler: RequestHandler) -> None:
    with pytest.raises(RequestError, match="max_output_tokens") as error:
        asyncio.run(handler.respond(parsed(max_output_tokens=5000)))
    assert error.value.param == "max_output_tokens"
