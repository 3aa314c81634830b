"""The other APIs through the clients that people have: anthropic and openai, sync and async, streamed and not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.serve_app.support import wait_for

QUESTION = "Hello! 🌊"
# The client has no argument for the temperature any more.
MESSAGE: dict[str, Any] = {
    "max_tokens": 24,
    "messages": [{"role": "user", "content": QUESTION}],
    "extra_body": {"temperature": 0},
}
RESPONSE: dict[str, Any] = {
    "max_output_tokens": 24,
    "temperature": 0,
    "input": QUESTION,
    "reasoning": {"effort": "none"},
}


@pytest.fixture
def claude(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_a_message_is_answered_by_every_way_of_asking(
    url: str, claude: anthropic.Anthropic, model: str
) -> None:
    whole = claude.messages.create(model=model, **MESSAGE)
    assert whole.type == "message" and text_of(whole) and whole.usage.output_tokens <= 24
    with claude.messages.stream(model=model, **MESSAGE) as stream:
        texts = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(texts) == text_of(final) == text_of(whole)
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens

    async def ask_together() -> list[str]:
        async with anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client:

            async def streamed() -> str:
                async with client.messages.stream(model=model, **MESSAGE) as stream:
                    return await stream.get_final_text()

            answer, *texts = await asyncio.gather(
                client.messages.create(model=model, **MESSAGE), streamed(), streamed()
            )
            return [text_of(answer), *texts]

    assert set(asyncio.run(ask_together())) == {text_of(whole)}


def test_a_stop_sequence_is_named(claude: anthropic.Anthropic, model: str) -> None:
    stop = text_of(claude.messages.create(model=model, **MESSAGE))[3:6]
    message = claude.messages.create(model=model, stop_sequences=[stop], **MESSAGE)
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)


def test_the_tokens_of_a_message_are_counted(claude: anthropic.Anthropic, model: str) -> None:
    counted = claude.messages.count_tokens(model=model, messages=MESSAGE["messages"])
    usage = claude.messages.create(model=model, **MESSAGE).usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_anthropics_client_raises_its_own_exceptions(claude: anthropic.Anthropic, model: str) -> None:
    with pytest.raises(anthropic.NotFoundError, match="gpt-x"):
        claude.messages.create(model="gpt-x", **MESSAGE)
    with pytest.raises(anthropic.BadRequestError, match="temperature") as error:
        claude.messages.create(model=model, **{**MESSAGE, "extra_body": {"temperature": 2}})
    assert error.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index,call-overload]
    with (
        pytest.raises(anthropic.BadRequestError, match="4096"),
        claude.messages.stream(
            model=model, max_tokens=1, messages=[{"role": "user", "content": "sea " * 5000}]
        ) as stream,
    ):
        stream.until_done()


def test_a_response_is_answered_by_every_way_of_asking(url: str, client: openai.OpenAI, model: str) -> None:
    whole = client.responses.create(model=model, **RESPONSE)
    assert whole.object == "response" and whole.output_text
    with client.responses.stream(model=model, **RESPONSE) as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        last = stream.get_final_response() if whole.status == "completed" else None
    assert "".join(texts) == whole.output_text
    assert last is None or last.output_text == whole.output_text
    *_, last_event = client.responses.create(model=model, stream=True, **RESPONSE)
    assert last_event.response.output_text == whole.output_text  # type: ignore[union-attr]

    async def ask_together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as asynchronous:

            async def streamed() -> str:
                events = await asynchronous.responses.create(model=model, stream=True, **RESPONSE)
                return "".join([e.delta async for e in events if e.type == "response.output_text.delta"])

            answer, text = await asyncio.gather(
                asynchronous.responses.create(model=model, **RESPONSE), streamed()
            )
            return [answer.output_text, text]

    assert set(asyncio.run(ask_together())) == {whole.output_text}


def test_a_response_that_is_not_stored_cannot_be_gone_on_with(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError, match="Previous response with id 'resp_1' not found") as error:
        client.responses.create(model=model, previous_response_id="resp_1", **RESPONSE)
    assert error.value.param == "previous_response_id"


def test_tokens_of_a_prompt_can_be_asked_for(http: httpx.Client, model: str) -> None:
    tokens = http.post("/tokenize", json={"model": model, "prompt": QUESTION}).json()
    back = http.post("/detokenize", json={"model": model, "tokens": tokens["tokens"]}).json()
    assert back == {"prompt": QUESTION} and tokens["max_model_len"] == 4096
    assert http.get("/version").json().keys() == {"version"}
    assert http.get(f"/v1/models/{model}").json()["max_model_len"] == 4096


def test_errors_have_the_form_of_their_api(http: httpx.Client) -> None:
    assert http.post("/v1/messages", content=b"{").json()["type"] == "error"
    assert http.post("/v1/messages", content=b"{").status_code == 400
    assert http.post("/tokenize", content=b"{").json()["error"]["type"] == "invalid_request_error"
    refused = http.get("/v1/messages")
    assert (refused.status_code, refused.headers["allow"], refused.json()["type"]) == (405, "POST", "error")


def test_the_openapi_page_is_served(http: httpx.Client) -> None:
    page = http.get("/openapi.json").json()
    assert {"/v1/messages", "/v1/responses", "/tokenize", "/v1/chat/completions"} <= page["paths"].keys()
    assert http.get("/docs").status_code == 200


CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"name": "get_weather", "description": "Weather of a city", "input_schema": CITY}
FUNCTION: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": CITY,
}
ASKED: dict[str, Any] = {"role": "user", "content": "What is the weather in Paris?"}


def test_an_agent_calls_a_tool_and_goes_on_with_its_result(claude: anthropic.Anthropic, model: str) -> None:
    request: dict[str, Any] = {
        **MESSAGE,
        "max_tokens": 160,
        "model": model,
        "tools": [WEATHER],
        "messages": [ASKED],
    }
    whole = claude.messages.create(**request)
    with claude.messages.stream(**request) as stream:
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        (call,) = [block for block in message.content if block.type == "tool_use"]
        assert (call.name, call.input, message.stop_reason) == ("get_weather", {"city": "Paris"}, "tool_use")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "18 °C and sunny"}
    turns = [ASKED, {"role": "assistant", "content": streamed.content}, {"role": "user", "content": [result]}]
    assert text_of(claude.messages.create(**{**request, "messages": turns}))


def test_thinking_is_a_block_of_its_own_where_it_is_asked_for(
    claude: anthropic.Anthropic, model: str
) -> None:
    question = [{"role": "user", "content": "What is 47 + 38?"}]
    request: dict[str, Any] = {**MESSAGE, "max_tokens": 160, "model": model, "messages": question}
    quiet = claude.messages.create(**request)
    assert [block.type for block in quiet.content] == ["text"] and "85" in text_of(quiet)
    with claude.messages.stream(thinking={"type": "adaptive"}, **request) as stream:
        thought = stream.get_final_message()
    assert [block.type for block in thought.content] == ["thinking", "text"] and "85" in text_of(thought)
    assert "<think>" not in text_of(thought)


def test_a_response_calls_a_function_and_goes_on_with_its_output(client: openai.OpenAI, model: str) -> None:
    request: dict[str, Any] = {
        **RESPONSE,
        "max_output_tokens": 160,
        "model": model,
        "tools": [FUNCTION],
        "input": [ASKED],
    }
    whole = client.responses.create(**request)
    with client.responses.stream(**request) as stream:
        streamed = stream.get_final_response()
    for response in (whole, streamed):
        (call,) = [item for item in response.output if item.type == "function_call"]
        assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris"})
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "18 °C and sunny"}
    assert client.responses.create(**{**request, "input": [ASKED, *streamed.output, output]}).output_text


def test_reasoning_is_an_item_of_its_own(client: openai.OpenAI, model: str) -> None:
    request: dict[str, Any] = {
        **RESPONSE,
        "max_output_tokens": 160,
        "input": "What is 47 + 38?",
        "reasoning": {"effort": "high"},
    }
    response = client.responses.create(model=model, **request)
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert "85" in response.output_text
    assert response.usage and response.usage.output_tokens_details.reasoning_tokens > 0


def test_embeddings_come_beside_chats(
    url: str, client: openai.OpenAI, model: str, idle: Callable[[], bool]
) -> None:
    texts = [f"The sea is {number} metres deep." for number in range(40)]
    plain = client.embeddings.create(model=model, input=texts, encoding_format="float")  # else base64

    async def ask_together() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            chat = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": QUESTION}], max_tokens=24
            )
            embeddings = (client.embeddings.create(model=model, input=text) for text in texts)
            return await asyncio.gather(chat, *embeddings)

    chat, *alone = asyncio.run(ask_together())
    assert chat.choices[0].message.content and chat.usage.completion_tokens <= 24
    assert sum(one.usage.total_tokens for one in alone) == plain.usage.total_tokens
    for one, other in zip(alone, plain.data, strict=True):
        assert one.data[0].embedding == pytest.approx(other.embedding, abs=1e-5)
    short = client.embeddings.create(model=model, input=texts[0], dimensions=8)
    assert len(short.data[0].embedding) == 8
    with pytest.raises(openai.BadRequestError) as error:
        client.embeddings.create(model=model, input=texts[0], dimensions=10**6)
    assert error.value.param == "dimensions"
    wait_for(idle)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/rerank", {"query": "x", "documents": ["y"]}),
        ("/v1/score", {"text_1": "x", "text_2": ["y"]}),
    ],
)
def test_a_model_that_is_no_reranker_refuses_to_rank(
    http: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == 400
    assert (
        answer.json()["error"]["param"] == "model" and "Qwen3-Reranker" in answer.json()["error"]["message"]
    )
