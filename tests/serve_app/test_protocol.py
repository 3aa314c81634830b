"""OpenAI's request forms: what is read from a body, and the one sentence a bad body gets."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qwen3_dist.errors import EngineDeadError, RequestError
from qwen3_dist.sampling_params import SamplingParams, StructuredOutputs
from serve_app.apis.chat.request import parse_chat
from serve_app.apis.completions import parse_completion
from serve_app.apis.shared.errors import error_object

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "hi"}
SCHEMA = {"type": "object", "properties": {"port": {"type": "string"}}}
LOOSE = {**SCHEMA, "x-guidance": {"lenient": True}}
TOOL = {"type": "function", "function": {"name": "tide", "parameters": SCHEMA}}


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
    assert completion(prompt=prompt).inputs == prompts


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


def test_every_sampling_field_reaches_the_sampling_parameters() -> None:
    fields: dict[str, Any] = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.2,
        "seed": 3,
        "stop": ["x"],
        "stop_token_ids": [5],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "min_tokens": 2,
        "max_tokens": 9,
        "bad_words": ["no"],
        "prompt_logprobs": 1,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "thinking_token_budget": 4,
    }
    expected = SamplingParams(**fields, logit_bias={5: 1.5})
    assert chat(**fields, logit_bias={"5": 1.5}).params({}) == expected
    assert completion(**fields, logit_bias={"5": 1.5}).params({}) == expected


@pytest.mark.parametrize(
    ("fields", "outputs"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, StructuredOutputs(json_object=True)),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": LOOSE, "strict": True}}},
            StructuredOutputs(json=SCHEMA),
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}},
            StructuredOutputs(json=LOOSE),
        ),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, StructuredOutputs(json=LOOSE)),
        ({"structured_outputs": {"json": SCHEMA}}, StructuredOutputs(json=SCHEMA)),
        ({"structured_outputs": {"json": LOOSE}}, StructuredOutputs(json=SCHEMA)),
        ({"guided_json": LOOSE}, StructuredOutputs(json=SCHEMA)),
        ({"structured_outputs": {"regex": "a+", "new": 1}}, StructuredOutputs(regex="a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, StructuredOutputs(choice=("a", "b"))),
        ({"guided_json": SCHEMA}, StructuredOutputs(json=SCHEMA)),
        ({"guided_regex": "a+"}, StructuredOutputs(regex="a+")),
        ({"guided_choice": ["a", "b"]}, StructuredOutputs(choice=("a", "b"))),
        ({"guided_grammar": "start: /a/"}, StructuredOutputs(grammar="start: /a/")),
        ({"guided_regex": "a+", "response_format": {"type": "text"}}, StructuredOutputs(regex="a+")),
    ],
)
def test_a_form_for_the_text_is_asked_for_in_openais_words_and_vllms(
    fields: dict[str, Any], outputs: StructuredOutputs | None
) -> None:
    assert chat(**fields).params({}).structured_outputs == outputs
    assert completion(**fields).params({}).structured_outputs == outputs


def test_tools_may_be_called_unless_the_client_says_otherwise() -> None:
    assert (chat().tools, chat().tool_choice) == ([], "none")
    assert (chat(tools=[TOOL]).tools, chat(tools=[TOOL]).tool_choice) == ([TOOL], "auto")
    assert chat(tools=[TOOL], tool_choice="none").tools == []
    named = chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "tide"}})
    assert (named.tool_choice, named.named_tool) == ("required", "tide")


def test_arguments_of_earlier_calls_reach_the_template_as_objects() -> None:
    def said(arguments: Any) -> Any:
        call = {"id": "c", "type": "function", "function": {"name": "tide", "arguments": arguments}}
        request = chat(messages=[{"role": "assistant", "content": None, "tool_calls": [call]}])
        return request.messages[0]["tool_calls"][0]["function"]["arguments"]

    assert said('{"port": "Brest"}') == {"port": "Brest"}
    assert said("") == {}
    assert said("not JSON") == "not JSON"
    assert said({"port": "Brest"}) == {"port": "Brest"}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, {}),
        ({"reasoning_effort": "none"}, {"reasoning_effort": "none", "enable_thinking": False}),
        ({"reasoning_effort": "low"}, {"reasoning_effort": "low", "enable_thinking": True}),
        ({"enable_thinking": False}, {"enable_thinking": False}),
        (
            {"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}},
            {"enable_thinking": False},
        ),
        ({"add_generation_prompt": False}, {"add_generation_prompt": False}),
        (
            {"continue_final_message": True},
            {"continue_final_message": True, "add_generation_prompt": False},
        ),
    ],
)
def test_the_template_is_told_what_the_client_says(fields: dict[str, Any], told: dict[str, Any]) -> None:
    usual = {"add_generation_prompt": True, "continue_final_message": False}
    assert chat(**fields).template_kwargs == usual | told


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
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
        ({"model": 3}, "model"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"temperature": -0.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"n": 0}, "n"),
        ({"n": 10**30}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"seed": "abc"}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 4, "min_tokens": 5}, "min_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_completion_tokens": "5"}, "max_completion_tokens"),
        ({"stop": 5}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids[0]"),
        ({"ignore_eos": "no"}, "ignore_eos"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"5": None}}, "logit_bias"),
        ({"bad_words": [""]}, "bad_words[0]"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"priority": "high"}, "priority"),
        ({"thinking_token_budget": -1}, "thinking_token_budget"),
        ({"reasoning_effort": "most"}, "reasoning_effort"),
        ({"enable_thinking": "yes"}, "enable_thinking"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "s"}}},
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"tools": "search"}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": 5, "function": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"function": {"name": "f", "parameters": 5}}]}, "tools[0].function.parameters"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice",
        ),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template": "{{ 7 }}"}, "chat_template"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
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
    ("fields", "param"),
    [
        ({"suffix": "the end"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"echo": "yes"}, "echo"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"prompt": ["a"] * 100, "n": 11}, "prompt"),
    ],
)
def test_what_a_completion_cannot_have_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        completion(**fields)
    assert refused.value.param == param


def test_a_field_that_is_not_built_may_ask_for_nothing() -> None:
    neutral = {"response_format": {"type": "text"}, "echo": False, "suffix": "", "functions": []}
    assert completion(**neutral, n=2, best_of=2).params({}) == completion(n=2).params({})


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
        b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        b'{"model": "m", "prompt": "hi", "max_tokens": ' + b"9" * 10_000 + b"}",
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
