"""Over HTTP: stored responses, lists of models, and errors in the form of the client's API."""

from __future__ import annotations

import anthropic
import httpx
import openai
import pytest

from tests.serve_app.support import error_of

HEADERS = {"anthropic-version": "2023-06-01"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_is_stored_for_requests_to_come(client: openai.OpenAI, model: str, stream: bool) -> None:
    options = {"model": model, "max_output_tokens": 4, "temperature": 0}
    if stream:
        events = client.responses.create(input="Hello!", stream=True, **options)  # type: ignore[call-overload]
        *_, last = events
        first = last.response
    else:
        first = client.responses.create(input="Hello!", **options)  # type: ignore[call-overload]
    second = client.responses.create(input="And now?", previous_response_id=first.id, **options)  # type: ignore[call-overload]
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens
    assert client.responses.retrieve(first.id).output == first.output
    reference = {"type": "item_reference", "id": first.output[0].id}
    third = client.responses.create(input=[{"role": "user", "content": "Hello!"}, reference], **options)  # type: ignore[call-overload]
    assert third.usage.input_tokens >= first.usage.input_tokens
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="Previous response with id"):
        client.responses.create(input="x", previous_response_id=first.id, **options)  # type: ignore[call-overload]
    follower = client.responses.create(input="x", previous_response_id=second.id, **options)  # type: ignore[call-overload]
    assert follower.usage.input_tokens > second.usage.input_tokens + second.usage.output_tokens


def test_models_are_listed_as_each_client_expects(
    http: httpx.Client, client: openai.OpenAI, url: str, model: str
) -> None:
    listed = http.get("/v1/models").json()
    assert http.get("/v1/models/").json() == listed
    assert [m.id for m in client.models.list()] == [m["id"] for m in listed["data"]]
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=60) as other:
        assert [m.display_name for m in other.models.list()] == [m["id"] for m in listed["data"]]
        assert other.models.retrieve(model).type == "model"
        with pytest.raises(anthropic.NotFoundError, match="not served here"):
            other.models.retrieve("claude")


def test_too_long_a_prompt_is_told_in_the_words_of_the_clients_api(http: httpx.Client, model: str) -> None:
    messages = [{"role": "user", "content": "word " * 6000}]
    error = error_of(http.post("/v1/chat/completions", json={"model": model, "messages": messages}), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    body = {"model": model, "messages": messages, "max_tokens": 5, "stream": True}
    answer = http.post("/v1/messages", json=body, headers=HEADERS)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].endswith("tokens > 4096 maximum")
