"""Conversations and tools of /v1/responses as Codex, the AI SDK and others send them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from qwen3_dist.errors import RequestError
from qwen3_dist.text.choice import ChoiceDelta, join
from qwen3_dist.text.parsed import ToolCallDelta
from serve_app.apis.responses.request import ResponsesRequest, parse_responses
from serve_app.apis.shared.answer import AnswerContext
from serve_app.apis.shared.prompts import Prompt
from tests.serve_app.support import server_events

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
USER = {"role": "user", "content": "Hello!"}
FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object"}}
PATCH = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edits files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /a+/"},
}
AGENTS = {
    "type": "namespace",
    "name": "agents",
    "description": "d",
    "tools": [{**FUNCTION, "name": "spawn"}, PATCH],
}
SEARCH = {"type": "web_search", "external_web_access": False}
CODEX = [FUNCTION, PATCH, AGENTS, SEARCH, {"type": "image_generation"}, {"type": "local_shell"}]


def parsed(**fields: Any) -> ResponsesRequest:
    return parse_responses(json.dumps({"model": "m", "input": "Hello!", **fields}).encode())


def conversation(*items: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    return parsed(input=list(items), **fields).messages


def calls(message: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]


def test_tools_that_clients_run_are_functions_and_others_are_left_out() -> None:
    functions = [tool["function"] for tool in parsed(tools=CODEX).tools]
    assert [function["name"] for function in functions] == [
        "f", "apply_patch", "agents__spawn", "agents__apply_patch",
    ]  # fmt: skip
    assert functions[1]["description"] == "Edits files.\n\nThe input follows this lark grammar:\nstart: /a+/"
    assert functions[1]["parameters"]["required"] == ["input"]
    assert parsed(tools=[SEARCH]).tools == []
    long = {**AGENTS, "name": "mcp__" + "x" * 200 + "/y__"}
    assert len(parsed(tools=[long]).tools[0]["function"]["name"]) == 128


@pytest.mark.parametrize(
    ("choice", "named"),
    [
        ({"type": "function", "name": "f"}, "f"),
        ({"type": "custom", "name": "apply_patch"}, "apply_patch"),
        ({"type": "function", "name": "spawn", "namespace": "agents"}, "agents__spawn"),
        ({"type": "function", "name": "spawn"}, "agents__spawn"),
    ],
)
def test_a_choice_names_a_tool_as_the_client_does(choice: dict[str, Any], named: str) -> None:
    assert parsed(tools=CODEX, tool_choice=choice).named_tool == named


def test_a_choice_may_allow_some_tools() -> None:
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]}
    request = parsed(tools=CODEX, tool_choice=allowed)
    assert ([tool["function"]["name"] for tool in request.tools], request.tool_choice) == (["f"], "required")


def test_a_choice_of_a_tool_that_openai_runs_is_refused() -> None:
    with pytest.raises(RequestError, match='"web_search" is a tool that OpenAI runs') as refused:
        parsed(tools=CODEX, tool_choice={"type": "web_search"})
    assert refused.value.param == "tool_choice.type"


DELTAS = [
    ChoiceDelta(0, "I edit.", (1,), (), None),
    ChoiceDelta(
        0, "", (1,), (), None, tool_calls=(ToolCallDelta(0, "call_a", "apply_patch", '{"input": "a\\'),)
    ),
    ChoiceDelta(0, "", (2,), (), None, tool_calls=(ToolCallDelta(0, arguments='nb"}'),)),
    ChoiceDelta(
        0, "", (3,), (), "tool_calls", tool_calls=(ToolCallDelta(1, "call_b", "agents__spawn", "{}"),)
    ),
]


def test_calls_are_named_and_formed_as_the_clients_tools_are() -> None:
    form = parsed(tools=CODEX).answer(AnswerContext("m", None, [Prompt([1])]))
    whole = Response.model_validate(form.full_response([join(DELTAS)]))
    _, patch, spawn = whole.output
    assert patch.type == "custom_tool_call"
    assert (patch.name, patch.input, patch.call_id) == ("apply_patch", "a\nb", "call_a")
    assert spawn.type == "function_call"
    assert (spawn.name, spawn.namespace, spawn.arguments) == ("spawn", "agents", "{}")


def test_a_custom_call_streams_its_input() -> None:
    form = parsed(tools=CODEX, stream=True).answer(AnswerContext("m", None, [Prompt([1])]))
    events = server_events(form.begin() + b"".join(form.delta(delta) for delta in DELTAS) + form.end())
    parts = [e["delta"] for e in events if e["type"] == "response.custom_tool_call_input.delta"]
    assert parts == ["a", "\nb"]
    (done,) = [e for e in events if e["type"] == "response.custom_tool_call_input.done"]
    assert done["input"] == "a\nb"
    state: ResponseStreamState[Any] = ResponseStreamState(input_tools=omit, text_format=omit)
    for event in events:
        state.handle_event(EVENT.validate_python(event))


def test_codexs_items_are_the_calls_and_results_that_they_stand_for() -> None:
    action = {"type": "exec", "command": ["ls"], "env": {}}
    turns = conversation(
        USER,
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": None, "encrypted_content": "secret"},
        {
            "type": "custom_tool_call",
            "call_id": "a",
            "name": "apply_patch",
            "input": "*** Begin",
            "status": None,
        },
        {"type": "function_call", "call_id": "b", "name": "spawn", "namespace": "agents", "arguments": ""},
        {"type": "local_shell_call", "call_id": "c", "status": "completed", "action": action},
        {"type": "custom_tool_call_output", "call_id": "a", "output": "Done."},
        {"type": "function_call_output", "call_id": "b", "output": None},
        {"type": "local_shell_call_output", "id": "c", "output": "file"},
        {"type": "web_search_call", "status": "completed", "action": {"type": "search", "query": "q"}},
        {"type": "ghost_snapshot", "ghost_commit": {}},
        {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "I must not."}]},
    )
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool", "tool", "tool", "assistant"]
    assert "reasoning_content" not in turns[1]
    assert calls(turns[1]) == [
        ("apply_patch", {"input": "*** Begin"}),
        ("agents__spawn", {}),
        ("local_shell", action),
    ]
    assert [(turn["tool_call_id"], turn["content"]) for turn in turns[2:5]] == [
        ("a", "Done."), ("b", ""), ("c", "file"),
    ]  # fmt: skip
    assert turns[5]["content"] == "I must not."


def test_a_call_that_openai_ran_has_its_result_with_it() -> None:
    item = {
        "type": "mcp_call",
        "id": "mcp_1",
        "server_label": "s",
        "name": "roll",
        "arguments": '{"n": 2}',
        "output": "7",
    }
    turns = conversation(
        USER, {"type": "mcp_list_tools", "tools": []}, item, {"role": "assistant", "content": "7!"}
    )
    assert calls(turns[1]) == [("roll", {"n": 2})]
    assert turns[2:] == [
        {"role": "tool", "tool_call_id": "mcp_1", "content": "7"},
        {"role": "assistant", "content": "7!"},
    ]


def test_a_tools_result_shows_text_and_a_word_for_all_else() -> None:
    parts = [{"type": "input_text", "text": "Seen: "}, {"type": "input_image", "image_url": "data:AA"}]
    (turn,) = conversation({"type": "function_call_output", "call_id": "a", "output": parts})
    assert turn["content"] == "Seen: [input_image left out: the model reads text alone]"


@pytest.mark.parametrize("role", ["developer", "system"])
def test_instructions_and_system_items_ahead_of_the_conversation_are_one_message(role: str) -> None:
    rules, late = {"role": role, "content": "B"}, {"role": role, "content": "C"}
    assert conversation(rules, USER, late, instructions="A") == [
        {"role": "system", "content": "A\n\nB"},
        USER,
        {"role": "system", "content": "C"},
    ]


@pytest.mark.parametrize("given", [[], ""])
def test_no_input_is_an_empty_question(given: Any) -> None:
    empty = {"role": "user", "content": ""}
    assert parsed(input=given).messages == [empty]
    assert parsed(input=given, instructions="A").messages == [{"role": "system", "content": "A"}, empty]


def test_an_item_may_bring_tools() -> None:
    added = {"type": "additional_tools", "role": "developer", "tools": [FUNCTION]}
    request = parsed(input=[added, USER])
    assert [tool["function"]["name"] for tool in request.tools] == ["f"]
    assert request.messages == [USER]


def test_the_answer_repeats_tools_as_they_were_given() -> None:
    form = parsed(tools=[SEARCH, AGENTS]).answer(AnswerContext("m", None, [Prompt([1])]))
    response = Response.model_validate(form.full_response([ChoiceDelta(0, "", (2,), (), "stop")]))
    assert [tool.type for tool in response.tools] == ["web_search", "namespace"]


BILLING = "x-anthropic-billing-header: cc_version=2.1.197.abc; cc_entrypoint=cli; cch=fa690;"


def test_claude_codes_billing_line_is_taken_out_of_instructions_and_system_messages() -> None:
    brief = {"role": "system", "content": "Be brief."}
    assert conversation(USER, instructions=f"{BILLING}\nBe brief.") == [brief, USER]
    assert conversation({"role": "developer", "content": f"{BILLING}\nBe brief."}, USER) == [brief, USER]
    assert conversation(USER, {"role": "system", "content": f"{BILLING}\nBe brief."}) == [USER, brief]
    assert conversation({"role": "system", "content": BILLING}, USER, instructions=BILLING) == [USER]


@pytest.mark.parametrize(
    "item", [{"type": "compaction"}, {"type": "reasoning"}, {"role": "system", "content": BILLING}]
)
def test_items_that_a_model_cannot_read_are_as_no_input(item: dict[str, Any]) -> None:
    assert conversation(item) == conversation() == [{"role": "user", "content": ""}]
