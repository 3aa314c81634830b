"""OpenAI's request forms: what is read from a body, and the one sentence a bad body gets."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qwen3_dist.errors import EngineDeadError, RequestError
from serve_app.protocol.chat import parse_chat
from serve_app.protocol.completions import parse_completion
from serve_app.protocol.errors import error_object

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "hi"}


def chat(**fields: Any) -> Any:
    return parse_chat(json.dumps({**CHAT, **fields}).encode())


def completion(**fields: Any) -> Any:
    return parse_completion(json.dumps({**COMPLETION, **fields}).encode())


def test_a_chat_request_may_use_the_whole_context_and_a_completion_sixteen_tokens() -> None:
    assert chat().params({}).max_tokens is None
    assert completion().params({}).max_tokens == 16


def test_max_completion_tokens_is_the_newer_name_and_wins() -> None:
    assert chat(max_tokens=5).params({}).max_tokens == 5
    assert chat(max_completion_tokens=7, max_tokens=5).params({}).max_tokens == 7


def test_the_checkpoints_defaults_apply_only_where_the_client_set_nothing() -> None:
    defaults = {"temperature": 0.6, "top_k": 20}
    params = chat(temperature=0, top_k=None).params(defaults)
    assert (params.temperature, params.top_k, params.top_p) == (0, 20, 1.0)


def test_null_is_the_same_as_absent_and_unknown_fields_are_ignored() -> None:
    assert (
        chat(stop=None, stream=None, tools=None, user="u", metadata={"a": 1}, service_tier="auto") == chat()
    )


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("hi", ["hi"]),
        ([1, 2], [[1, 2]]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [1]], ["a", [1]]),
    ],
)
def test_a_prompt_is_text_or_token_ids_or_a_list_of_either(prompt: Any, prompts: list[Any]) -> None:
    assert completion(prompt=prompt).prompts == prompts


def test_chat_and_completions_ask_for_logprobs_each_in_their_own_form() -> None:
    assert chat(logprobs=True).params({}).logprobs == 0
    assert chat(logprobs=True, top_logprobs=3).params({}).logprobs == 3
    assert chat(logprobs=False).params({}).logprobs is None
    assert completion(logprobs=2).params({}).logprobs == 2


def test_a_developer_message_is_a_system_message() -> None:
    request = chat(messages=[{"role": "developer", "content": "be brief"}, *CHAT["messages"]])
    assert request.messages[0] == {"role": "system", "content": "be brief"}


def test_stop_is_one_string_or_several() -> None:
    assert chat(stop="x").params({}).stop == ("x",)
    assert chat(stop=["x", "y"]).params({}).stop == ("x", "y")
    assert chat(stop=[]).params({}).stop == ()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"model": 3}, "model"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"temperature": -0.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"n": 0}, "n"),
        ({"seed": "abc"}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_completion_tokens": "5"}, "max_completion_tokens"),
        ({"stop": 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
        ({"ignore_eos": "no"}, "ignore_eos"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": "search"}, "tools"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ],
)
def test_a_known_field_of_the_wrong_kind_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        chat(**fields)
    assert refused.value.param == param
    assert str(refused.value).startswith(param)


@pytest.mark.parametrize("prompt", [[], "", [1.5], [[]], [["a"]], {"a": 1}, [True], 7])
def test_a_prompt_of_another_form_is_refused(prompt: Any) -> None:
    with pytest.raises(RequestError) as refused:
        completion(prompt=prompt)
    assert refused.value.param == "prompt"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("response_format", {"type": "json_object"}),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("logit_bias", {"5": 1}),
        ("best_of", 2),
        ("echo", True),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
    ],
)
def test_a_field_that_is_not_built_yet_says_so(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match="is not supported yet") as refused:
        completion(**{name: value})
    assert refused.value.param == name


def test_a_field_that_is_not_built_may_ask_for_nothing() -> None:
    neutral = {
        "response_format": {"type": "text"},
        "tool_choice": "auto",
        "presence_penalty": 0.0,
        "echo": False,
    }
    assert completion(**neutral, best_of=1, logit_bias={}) == completion()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b'"text"',
        b'{"model": "m", "prompt": "hi", "temperature": NaN}',
        b'{"model": "m", "prompt": "hi", "temperature": Infinity}',
        b'{"model": "m", "prompt": "\\ud800"}',
        b'{"model": "m", "prompt": "\xff"}',
        b"[" * 10_000,
    ],
)
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError, match="request body"):
        parse_completion(body)


def test_a_number_too_large_for_a_float_is_no_temperature() -> None:
    with pytest.raises(RequestError, match="temperature"):
        parse_completion(b'{"model": "m", "prompt": "hi", "temperature": 1e999}')


def test_errors_take_openais_form() -> None:
    refused = RequestError("model 'x' is not served here", param="model", status=404)
    assert error_object(refused) == {
        "error": {
            "message": "model 'x' is not served here",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }
    assert error_object(EngineDeadError("rank 1 died"))["error"]["type"] == "server_error"


def test_an_unforeseen_error_does_not_show_its_text_to_clients() -> None:
    assert "secret" not in error_object(KeyError("secret"))["error"]["message"]
