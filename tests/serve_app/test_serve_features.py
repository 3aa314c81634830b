"""What a request may ask of sampling, thinking, tools, forms and adapters: openai's client, a real server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pydantic
import pytest

from tests.serve_app.conftest import ADAPTER

HELLO: Any = [{"role": "user", "content": "Hello!"}]
SUM: Any = [{"role": "user", "content": "What is 47 + 38?"}]
WEATHER: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: Any = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather of a city", "parameters": CITY},
}
QUIET: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": False}}
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 160}


class Sum(pydantic.BaseModel):
    total: int


def text(client: openai.OpenAI, model: str, **fields: Any) -> str:
    return (
        client.completions.create(model=model, **{"prompt": "Once upon a time", "max_tokens": 12, **fields})
        .choices[0]
        .text
    )


def test_every_sampling_field_is_taken_and_has_its_effect(client: openai.OpenAI, model: str) -> None:
    plain = text(client, model, temperature=0)
    first = client.completions.create(
        model=model, prompt="Once upon a time", max_tokens=1, temperature=0, logprobs=2
    )
    assert first.choices[0].logprobs and first.choices[0].logprobs.top_logprobs
    assert len(first.choices[0].logprobs.top_logprobs[0]) == 2
    forced = {"32": 100}  # the token "A" or whatever it is: the same one each time
    biased = client.completions.create(
        model=model,
        prompt="Once upon a time",
        max_tokens=4,
        temperature=0,
        logit_bias=forced,
        extra_body={"return_token_ids": True},
    )
    assert biased.choices[0].token_ids == [32] * 4  # type: ignore[attr-defined]
    assert text(client, model, temperature=0, frequency_penalty=2, max_tokens=40) != text(
        client, model, temperature=0, max_tokens=40
    )
    sampled = {"temperature": 1.5, "seed": 7}
    extra = {"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 5}
    assert text(client, model, extra_body=extra, **sampled) == text(
        client, model, extra_body=extra, **sampled
    )
    assert text(client, model, temperature=2, extra_body={"top_k": 1}) == plain
    for words, said in (([], True), (["help"], False)):
        chat = client.chat.completions.create(
            model=model, messages=HELLO, extra_body={**QUIET, "bad_words": words}, **GREEDY
        )
        assert ("help" in (chat.choices[0].message.content or "")) == said
    assert text(client, model, temperature=0, echo=True) == f"Once upon a time{plain}"
    kept = text(
        client, model, temperature=0, stop=[plain[4:7]], extra_body={"include_stop_str_in_output": True}
    )
    assert plain.startswith(kept) and kept.endswith(plain[4:7])


def test_prompts_are_scored(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model, prompt="Once upon a time", max_tokens=0, echo=True, logprobs=1
    )
    columns = answer.choices[0].logprobs
    assert columns and columns.token_logprobs and columns.tokens
    assert answer.choices[0].text == "Once upon a time" == "".join(columns.tokens)
    assert columns.token_logprobs[0] is None and all(value <= 0 for value in columns.token_logprobs[1:])
    chat = client.chat.completions.create(
        model=model, messages=HELLO, max_tokens=2, extra_body={"prompt_logprobs": 0}
    )
    assert chat.usage and len(chat.prompt_logprobs) == chat.usage.prompt_tokens  # type: ignore[attr-defined]


def test_thoughts_come_apart_and_within_their_budget(client: openai.OpenAI, model: str) -> None:
    whole = client.chat.completions.create(model=model, messages=SUM, **GREEDY)
    message: Any = whole.choices[0].message
    assert message.content == "47 + 38 = 85" and message.reasoning == message.reasoning_content != ""
    assert whole.usage and whole.usage.completion_tokens_details
    thought = whole.usage.completion_tokens_details.reasoning_tokens or 0
    assert 6 < thought < whole.usage.completion_tokens
    parts: list[Any] = [
        chunk.choices[0].delta
        for chunk in client.chat.completions.create(model=model, messages=SUM, stream=True, **GREEDY)
    ]
    assert "".join(getattr(part, "reasoning_content", None) or "" for part in parts) == message.reasoning
    assert "".join(part.content or "" for part in parts) == message.content
    budget = client.chat.completions.create(
        model=model, messages=SUM, extra_body={"thinking_token_budget": 6}, **GREEDY
    )
    assert budget.usage and budget.usage.completion_tokens_details
    assert budget.usage.completion_tokens_details.reasoning_tokens == 6
    silent: Any = client.chat.completions.create(model=model, messages=SUM, extra_body=QUIET, **GREEDY)
    assert getattr(silent.choices[0].message, "reasoning", None) is None and silent.choices[0].message.content


@pytest.mark.parametrize(
    "choice", ["auto", "required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_tools_are_called_and_their_results_read(client: openai.OpenAI, model: str, choice: Any) -> None:
    asked: dict[str, Any] = {
        "model": model,
        "messages": WEATHER,
        "tools": [TOOL],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "extra_body": QUIET,
        **GREEDY,
    }
    whole = client.chat.completions.create(**asked).choices[0]
    with client.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion().choices[0]
    for said in (whole, streamed):
        assert said.message.tool_calls and len(said.message.tool_calls) == 1
        call: Any = said.message.tool_calls[0]
        assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
        assert said.finish_reason == ("stop" if isinstance(choice, dict) else "tool_calls")
    turns = [*WEATHER, whole.message, {"role": "tool", "tool_call_id": call.id, "content": "18 °C and sunny"}]
    assert (
        client.chat.completions.create(**{**asked, "messages": turns, "tool_choice": "none"})
        .choices[0]
        .message.content
    )


def test_a_form_is_kept_also_after_thoughts_and_in_a_stream(client: openai.OpenAI, model: str) -> None:
    parsed = client.chat.completions.parse(model=model, messages=SUM, response_format=Sum, **GREEDY)
    assert isinstance(parsed.choices[0].message.parsed, Sum) and parsed.choices[0].finish_reason == "stop"
    assert parsed.choices[0].message.reasoning  # type: ignore[attr-defined]
    for extra, allowed in (
        ({"structured_outputs": {"choice": ["red", "blue"]}}, ("red", "blue")),
        ({"guided_regex": "(yes|no)!"}, ("yes!", "no!")),
        ({"guided_grammar": 'root ::= "a" | "b"'}, ("a", "b")),
    ):
        stream = client.chat.completions.create(
            model=model, messages=HELLO, stream=True, extra_body={**QUIET, **extra}, **GREEDY
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) in allowed
    short = {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 2, "maxItems": 4}
    answer = text(client, model, extra_body={"guided_json": short}, max_tokens=60, temperature=0)
    assert set(json.loads(answer)) <= {1, 2, 3}


def test_a_form_that_cannot_be_is_400_and_disturbs_nobody(client: openai.OpenAI, model: str) -> None:
    before = text(client, model, temperature=0)
    deep: Any = {"type": "object"}
    for _ in range(200):
        deep = {"type": "object", "properties": {"a": deep}}
    for extra, param in (
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_regex": "(a{1000}){1000}" * 50}, "guided_regex"),
        ({"structured_outputs": {"json": {"type": "sausage"}}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": {"$ref": "http://127.0.0.1/x"}}}, "structured_outputs.json"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            text(client, model, extra_body=extra)
        assert caught.value.param == param
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=model,
            messages=HELLO,
            stream=True,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "x"}}},
        )
    assert caught.value.param == "response_format"
    assert text(client, model, temperature=0) == before


def test_an_adapter_is_a_model_of_its_own_in_every_api_and_shares_batches(
    url: str, client: openai.OpenAI, http: httpx.Client, model: str
) -> None:
    assert {entry.id for entry in client.models.list()} == {model, ADAPTER}
    assert http.get(f"/v1/models/{ADAPTER}").json()["parent"] == model
    alone = {name: text(client, name, temperature=0) for name in (model, ADAPTER)}
    assert alone[model] != alone[ADAPTER]

    async def together() -> list[tuple[str, str]]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as asynchronous:

            async def ask(name: str) -> tuple[str, str]:
                answer = await asynchronous.completions.create(
                    model=name, prompt="Once upon a time", max_tokens=12, temperature=0
                )
                return name, answer.choices[0].text

            return await asyncio.gather(*(ask(name) for name in list(alone) * 4))

    assert all(alone[name] == said for name, said in asyncio.run(together()))
    said = client.responses.create(model=ADAPTER, input="Hello!", max_output_tokens=16)
    assert said.model == ADAPTER
