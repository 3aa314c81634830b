"""Conversations in Anthropic's form as Claude Code and others send them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qwen3_dist.errors import RequestError
from serve_app.apis.messages.answer import message_error
from serve_app.apis.messages.request import MessagesRequest, parse_count_tokens, parse_messages

HELLO = {"role": "user", "content": "Hello!"}
BILLING = "x-anthropic-billing-header: cc_version=2.1.197.abc; cc_entrypoint=cli; cch=fa690;"
TOOL = {"name": "get_weather", "input_schema": {"type": "object"}}
SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}


def parsed(**fields: Any) -> MessagesRequest:
    body = {"model": "m", "max_tokens": 16, "messages": [HELLO], **fields}
    return parse_messages(json.dumps(body).encode())


def conversation(*messages: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    return parsed(messages=list(messages), **fields).messages


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        (BILLING, None),
        (f"{BILLING}\nBe brief.", "Be brief."),
        (f"{BILLING} Be brief.", "Be brief."),
        (f"Be kind.\n{BILLING}\nBe brief.", "Be kind.\nBe brief."),
        (f"{BILLING}\r\n\r\nBe brief.", "Be brief."),
        ("x-anthropic-billing-header: new form\nBe brief.", "Be brief."),
        ("Explain x-anthropic-billing-header: a=b;", "Explain x-anthropic-billing-header: a=b;"),
    ],
)
def test_the_billing_line_is_taken_out_of_the_text_around_it(system: str, expected: str | None) -> None:
    leading = [{"role": "system", "content": expected}] if expected else []
    for form in (system, [text(system)], [text(BILLING), text(system)]):
        assert conversation(HELLO, system=form) == [*leading, HELLO]
    assert conversation({"role": "system", "content": system}, HELLO) == [*leading, HELLO]


@pytest.mark.parametrize(
    "content", [[], [{"type": "thinking", "thinking": "Hm."}], [{"type": "redacted_thinking", "data": "x"}]]
)
def test_a_conversation_that_says_nothing_is_refused_by_what_is_empty(content: list[Any]) -> None:
    for system in ("", BILLING):
        with pytest.raises(
            RequestError, match=r"^messages\[0\]\.content must have something that"
        ) as refused:
            conversation({"role": "user", "content": content}, system=system)
        assert refused.value.param == "messages[0].content"


SAID = {"role": "assistant", "content": "Hi."}


@pytest.mark.parametrize(
    "content",
    [
        "",
        [],
        [text("")],
        [{"type": "thinking", "thinking": "Hm."}, text("")],
        [{"type": "redacted_thinking"}],
    ],
)
@pytest.mark.parametrize("others", [[SAID, HELLO], [SAID], []])
def test_a_users_turn_that_says_nothing_is_refused_by_its_place(content: Any, others: list[Any]) -> None:
    messages = [HELLO, SAID, {"role": "user", "content": content}, *others]
    body = {"model": "m", "max_tokens": 16, "messages": messages, "system": "Be brief."}
    for parse in (parse_messages, parse_count_tokens):
        with pytest.raises(RequestError, match=r"^messages\[2\]\.content must have something") as refused:
            parse(json.dumps(body).encode())
        assert refused.value.param == "messages[2].content"


@pytest.mark.parametrize(
    "content", [" ", [text(""), text("a")], [{"type": "tool_result", "tool_use_id": "t"}]]
)
def test_white_space_and_a_result_without_content_are_a_users_turn(content: Any) -> None:
    said = conversation(HELLO, SAID, {"role": "user", "content": content}, SAID, HELLO)
    assert [turn["role"] for turn in said][1::2] == ["assistant", "assistant"] and len(said) == 5


@pytest.mark.parametrize("content", ["", [], [{"type": "thinking", "thinking": "Hm."}]])
def test_an_assistant_that_said_nothing_keeps_its_turn(content: Any) -> None:
    said = conversation(HELLO, {"role": "assistant", "content": content}, HELLO)
    assert [turn["role"] for turn in said] == ["user", "assistant", "user"]


def test_system_texts_ahead_of_the_conversation_are_one_and_later_ones_stay() -> None:
    turns = conversation(
        {"role": "system", "content": "B"},
        HELLO,
        {"role": "system", "content": [text("C")]},
        HELLO,
        system="A",
    )
    assert turns == [
        {"role": "system", "content": "A\n\nB"},
        HELLO,
        {"role": "system", "content": "C"},
        HELLO,
    ]


LEFT_OUT = "left out: the model reads text alone"


@pytest.mark.parametrize(
    ("block", "shown"),
    [
        ({"type": "image", "source": {"type": "base64", "data": "AA"}}, f"[image {LEFT_OUT}]"),
        ({"type": "tool_reference", "tool_name": "grep"}, "[tool grep]"),
        ({"type": "document", "title": "T", "source": {"type": "text", "data": "words"}}, "T\nwords"),
        (
            {"type": "document", "title": "T", "source": {"type": "base64", "data": "AA"}},
            f"T\n[document {LEFT_OUT}]",
        ),
        ({"type": "document", "source": {"type": "content", "content": [text("a"), text("b")]}}, "a\nb"),
        ({"type": "search_result", "title": "T", "source": "u", "content": [text("a")]}, "T\nu\na"),
        ({"type": "browser_state", "tabs": []}, "[browser_state]"),
    ],
)  # fmt: skip
def test_a_tools_result_shows_text_and_a_word_for_all_else(block: dict[str, Any], shown: str) -> None:
    result = {"type": "tool_result", "tool_use_id": "t", "content": [text("So:"), block]}
    assert conversation({"role": "user", "content": [result]}) == [
        {"role": "tool", "tool_call_id": "t", "content": f"So:\n{shown}"}
    ]


def test_documents_of_text_are_read_and_files_of_a_user_refused() -> None:
    document = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "words"}}
    assert conversation({"role": "user", "content": [document]})[0]["content"] == [text("words")]
    for block, param in (
        ({"type": "image", "source": {"type": "url", "url": "u"}}, "type"),
        ({"type": "document", "source": {"type": "base64", "data": "AA"}}, "source.type"),
    ):
        with pytest.raises(RequestError, match="reads text only") as refused:
            conversation({"role": "user", "content": [block]})
        assert refused.value.param == f"messages[0].content[0].{param}"


def test_what_anthropic_ran_for_an_earlier_answer_is_a_call_and_its_result() -> None:
    search = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "q"}}
    found = [{"type": "web_search_result", "title": "A", "url": "u", "encrypted_content": "secret"}]
    result = {"type": "web_search_tool_result", "tool_use_id": "s", "content": found}
    blocks = [text("I look."), search, result, text("It rains."), {"type": "from_the_future"}]
    assert conversation(HELLO, {"role": "assistant", "content": blocks}, HELLO)[1:-1] == [
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [
                {
                    "id": "s",
                    "type": "function",
                    "function": {"name": "web_search", "arguments": {"query": "q"}},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "s", "content": "A\nu"},
        {"role": "assistant", "content": "It rains."},
    ]


@pytest.mark.parametrize("given", [None, "", "null", {}])
def test_a_call_without_input_has_no_arguments(given: Any) -> None:
    call = {"type": "tool_use", "id": "t", "name": "f", "input": given}
    (_, turn) = conversation(HELLO, {"role": "assistant", "content": [call]})
    assert turn["tool_calls"][0]["function"]["arguments"] == {}


def test_tools_that_anthropic_runs_are_left_out_and_those_it_defines_for_clients_are_functions() -> None:
    bash = {"type": "bash_20250124", "name": "bash"}
    editor = {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"}
    request = parsed(tools=[SEARCH, TOOL, bash, editor, {"type": "mcp_toolset", "mcp_server_name": "x"}])
    names = [tool["function"]["name"] for tool in request.tools]
    assert names == ["get_weather", "bash", "str_replace_based_edit_tool"]
    assert request.tools[2]["function"]["parameters"]["required"] == ["command", "path"]
    assert parsed(tools=[SEARCH]).tools == []


@pytest.mark.parametrize("tools", [[SEARCH], [SEARCH, TOOL]])
def test_a_choice_of_a_tool_that_anthropic_runs_is_refused(tools: list[Any]) -> None:
    with pytest.raises(RequestError, match="web_search is a tool that Anthropic runs") as refused:
        parsed(tools=tools, tool_choice={"type": "tool", "name": "web_search"})
    assert refused.value.param == "tool_choice.name"


@pytest.mark.parametrize("thread", [{"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}])
def test_a_thread_is_refused_by_the_code_after_which_clients_send_whole_histories(thread: Any) -> None:
    body = {"model": "m", "max_tokens": 5, "messages": [HELLO], "thread": thread}
    for parse in (parse_messages, parse_count_tokens):
        with pytest.raises(RequestError, match="send all messages") as error:
            parse(json.dumps(body).encode())
        told = message_error(error.value)["error"]
        assert told["type"] == "invalid_request_error"
        assert told["details"] == {"error_code": "thread_unsupported_request"}
    assert parse_messages(json.dumps({**body, "thread": None}).encode()).messages == [HELLO]
