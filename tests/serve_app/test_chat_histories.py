"""Conversations in chat's form as agents send them: odd arguments, nulls, older fields, custom and hosted tools."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletion

from qwen3_dist.errors import RequestError
from qwen3_dist.text.choice import ChoiceDelta, join
from qwen3_dist.text.parsed import ToolCallDelta
from serve_app.apis.chat.request import ChatRequest, parse_chat
from serve_app.apis.shared.answer import AnswerContext
from serve_app.apis.shared.custom_tools import CustomInput
from serve_app.apis.shared.prompts import Prompt

USER = {"role": "user", "content": "Hello!"}
FUNCTION = {"type": "function", "function": {"name": "f"}}
GRAMMAR = {"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: /a+/"}}
PATCH = {"type": "custom", "custom": {"name": "patch", "description": "Edits.", "format": GRAMMAR}}
SEARCH = {"type": "web_search_preview", "search_context_size": "low"}


def parsed(**fields: Any) -> ChatRequest:
    return parse_chat(json.dumps({"model": "m", "messages": [USER], **fields}).encode())


def conversation(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    return parsed(messages=list(messages)).messages


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


@pytest.mark.parametrize("arguments", ["", " ", "\n", "null", None, {}, "{}"])
def test_blank_and_null_arguments_are_none(arguments: Any) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    (message,) = conversation({"role": "assistant", "content": None, "tool_calls": [call]})
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [('"Beijing"', '"Beijing"'), ('["a"]', '["a"]'), ('{"x": "cut', '{"x": "cut'), ("7", "7"), ([1], "[1]"), (7, "7")],
)  # fmt: skip
def test_arguments_that_are_no_object_keep_their_text(arguments: Any, shown: str) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    (message,) = conversation({"role": "assistant", "tool_calls": [call]})
    assert message["tool_calls"][0]["function"]["arguments"] == shown


def test_nulls_are_as_if_absent() -> None:
    call = {"id": None, "type": None, "function": {"name": "f", "arguments": "{}"}}
    blank = {"name": None, "refusal": None, "audio": None, "function_call": None, "reasoning_content": None}
    turns = conversation(
        {"role": "user", "content": "Hi", "name": None},
        {"role": "assistant", "content": None, "tool_calls": [call], **blank},
        {"role": "tool", "content": None, "tool_call_id": None, "name": None},
        {"role": "assistant", "content": "Done.", "tool_calls": None, **blank},
    )
    assert turns[1] == {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
    }
    assert turns[2:] == [{"role": "tool", "content": ""}, {"role": "assistant", "content": "Done."}]


def test_refusals_and_parts_of_responses_are_text() -> None:
    (message,) = conversation({"role": "assistant", "content": None, "refusal": "I must not."})
    assert message == {"role": "assistant", "content": "I must not."}
    parts = [{"type": "refusal", "refusal": "No."}, {"type": "output_text", "text": "Yes."}]
    (message,) = conversation({"role": "assistant", "content": parts})
    assert message["content"] == [text("No."), text("Yes.")]


@pytest.mark.parametrize(
    "part", [{"type": "thinking", "thinking": "Hm.", "signature": ""}, {"type": "reasoning", "text": "Hm."}]
)
def test_thoughts_among_the_parts_of_an_answer_are_its_reasoning(part: dict[str, Any]) -> None:
    said = {"role": "assistant", "content": [part, text("Yes.")]}
    (message,) = conversation(said)
    assert message == {"role": "assistant", "content": [text("Yes.")], "reasoning_content": "Hm."}
    (message,) = conversation({**said, "reasoning_content": "Well."})
    assert message == {"role": "assistant", "content": [text("Yes.")], "reasoning_content": "Well."}
    (message,) = conversation({"role": "assistant", "content": [part]})
    assert message == {"role": "assistant", "content": "", "reasoning_content": "Hm."}
    with pytest.raises(RequestError) as refused:
        conversation({"role": "user", "content": [part]})
    assert refused.value.param == "messages[0].content[0].type"


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_strings_among_parts_are_text(role: str) -> None:
    (message,) = conversation({"role": role, "content": ["a", text("b")]})
    assert message["content"] == [text("a"), text("b")]


def test_the_older_function_call_is_a_tool_call() -> None:
    turns = conversation(
        USER,
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}},
        {"role": "function", "name": "f", "content": "2"},
    )
    assert turns[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert turns[2] == {"role": "tool", "name": "f", "content": "2"}


def test_what_is_no_text_in_a_tools_result_has_a_stand_in_and_elsewhere_is_refused() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
    (message,) = conversation({"role": "tool", "tool_call_id": "c", "content": [text("seen"), image]})
    assert message["content"] == [
        text("seen"),
        text("[image_url left out: the model reads text alone]"),
    ]
    with pytest.raises(RequestError) as refused:
        conversation({"role": "user", "content": [image]})
    assert refused.value.param == "messages[0].content[0].type"


def test_a_custom_tool_is_a_function_of_one_string_and_hosted_tools_are_left_out() -> None:
    request = parsed(tools=[FUNCTION, PATCH, SEARCH])
    names = [tool["function"]["name"] for tool in request.tools]
    assert (names, request.tool_choice) == (["f", "patch"], "auto")
    function = request.tools[1]["function"]
    assert function["description"] == "Edits.\n\nThe input follows this lark grammar:\nstart: /a+/"
    assert function["parameters"]["required"] == ["input"]
    assert parsed(tools=[SEARCH]).tools == []


def test_a_choice_may_name_a_custom_tool_or_allow_some_tools() -> None:
    named = {"type": "custom", "custom": {"name": "patch"}}
    assert parsed(tools=[FUNCTION, PATCH], tool_choice=named).named_tool == "patch"
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [FUNCTION]}}
    request = parsed(tools=[FUNCTION, PATCH], tool_choice=allowed)
    assert (request.tools, request.tool_choice, request.named_tool) == ([FUNCTION], "required", None)


def test_a_custom_call_in_the_history_is_a_call_of_that_function() -> None:
    call = {"id": "c", "type": "custom", "custom": {"name": "patch", "input": "*** Begin"}}
    (message,) = conversation({"role": "assistant", "tool_calls": [call]})
    function = {"name": "patch", "arguments": {"input": "*** Begin"}}
    assert message["tool_calls"] == [{"id": "c", "type": "function", "function": function}]


DELTAS = [
    ChoiceDelta(0, "", (1,), (), None, tool_calls=(ToolCallDelta(0, "call_a", "patch", '{"input": "a\\'),)),
    ChoiceDelta(0, "", (2,), (), None, tool_calls=(ToolCallDelta(0, arguments='nb"}'),)),
    ChoiceDelta(0, "", (3,), (), "tool_calls", tool_calls=(ToolCallDelta(1, "call_b", "f", "{}"),)),
]


def test_a_custom_call_is_answered_with_its_input() -> None:
    form = parsed(tools=[FUNCTION, PATCH]).answer(AnswerContext("m", None, [Prompt([1])]))
    (choice,) = form.full_response([join(DELTAS)])["choices"]
    assert choice["message"]["tool_calls"] == [
        {"id": "call_a", "type": "custom", "custom": {"name": "patch", "input": "a\nb"}},
        {"id": "call_b", "type": "function", "function": {"name": "f", "arguments": "{}"}},
    ]
    ChatCompletion.model_validate({**form.full_response([join(DELTAS)])})


def test_a_custom_call_streams_its_input() -> None:
    form = parsed(tools=[FUNCTION, PATCH], stream=True).answer(AnswerContext("m", None, [Prompt([1])]))
    chunks = [json.loads(part) for delta in DELTAS for part in form.delta(delta).decode().split("data: ")[1:]]
    parts = [part for chunk in chunks for part in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert parts == [
        {"index": 0, "id": "call_a", "type": "custom", "custom": {"name": "patch", "input": "a"}},
        {"index": 0, "custom": {"input": "\nb"}},
        {"index": 1, "id": "call_b", "type": "function", "function": {"name": "f", "arguments": "{}"}},
    ]


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"input": "\\u00e9 \\ud83d\\ude00 \\"q\\""}', 'é 😀 "q"'),
        ('{"input": "cut', "cut"),
        ('{"patch": "by another name"}', "by another name"),
        ('{"a": 1, "b": 2}', '{"a": 1, "b": 2}'),
        ("{}", "{}"),
    ],
)
def test_the_input_of_a_custom_call_is_the_same_however_it_is_split(arguments: str, shown: str) -> None:
    for size in (1, 3, len(arguments)):
        given = CustomInput()
        parts = [given.push(arguments[at : at + size]) for at in range(0, len(arguments), size)]
        assert "".join(parts) + given.finish() == shown


BILLING = "x-anthropic-billing-header: cc_version=2.1.197.abc; cc_entrypoint=cli; cch=fa690;"


@pytest.mark.parametrize("role", ["system", "developer"])
def test_claude_codes_billing_line_is_taken_out_of_system_messages(role: str) -> None:
    brief = {"role": "system", "content": "Be brief."}
    assert conversation({"role": role, "content": f"{BILLING}\nBe brief."}, USER) == [brief, USER]
    assert conversation({"role": role, "content": BILLING}, USER) == [USER]
    assert conversation({"role": role, "content": [text(BILLING)]}, USER) == [USER]
    assert conversation(USER, {"role": role, "content": [text(BILLING), text("Be brief.")]}) == [
        USER,
        {"role": "system", "content": [text("Be brief.")]},
    ]
    assert conversation({"role": role, "content": ""}, USER) == [{"role": "system", "content": ""}, USER]
    said = {"role": "user", "content": f"{BILLING}\nBe brief."}
    assert conversation(said) == [said]
