"""What bad input gets: the right status, OpenAI's error object, one sentence."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.serve_app.support import error_of

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
        ({"temperature": -1}, "temperature"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ],
)
def test_a_bad_chat_request_names_its_field(
    http: httpx.Client, model: str, fields: dict[str, Any], param: str, stream: bool
) -> None:
    body = {"model": model, "messages": MESSAGES, "stream": stream, **fields}
    error = error_of(http.post(CHAT, json=body), 400)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


@pytest.mark.parametrize("body", [b"{", b"", b'{"model": NaN}', b"[]"])
def test_a_body_that_is_no_json_object_is_400(http: httpx.Client, body: bytes) -> None:
    assert "request body" in error_of(http.post(CHAT, content=body), 400)["message"]


def test_a_body_that_says_it_is_no_json_is_400(http: httpx.Client, model: str) -> None:
    answer = http.post("/v1/completions", data={"model": model, "prompt": "hi"})
    assert "content type" in error_of(answer, 400)["message"]


def test_an_unknown_model_is_404_and_says_which_is_served(http: httpx.Client, model: str) -> None:
    error = error_of(http.post(CHAT, json={"model": "gpt-x", "messages": MESSAGES}), 404)
    assert error["code"] == "model_not_found" and model in error["message"]
    error_of(http.get("/v1/models/gpt-x"), 404)


def test_the_client_library_raises_its_own_exceptions(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-x", messages=MESSAGES)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model=model, messages=MESSAGES, temperature=9)  # type: ignore[arg-type]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_longer_than_the_context_is_told_both_lengths(
    http: httpx.Client, model: str, stream: bool
) -> None:
    body = {"model": model, "prompt": [5] * 5000, "stream": stream}
    message = error_of(http.post("/v1/completions", json=body), 400)["message"]
    assert "5000" in message and "4096" in message


def test_a_token_id_outside_the_vocabulary_is_400(http: httpx.Client, model: str) -> None:
    error = error_of(http.post("/v1/completions", json={"model": model, "prompt": [10**9]}), 400)
    assert error["param"] == "prompt"


def test_a_body_over_the_limit_is_413(http: httpx.Client, model: str) -> None:
    body = {"model": model, "prompt": "x" * (7 * 2**20)}
    assert "larger than" in error_of(http.post("/v1/completions", json=body), 413)["message"]


def test_requests_and_answers_may_be_larger_than_grpc_takes_by_default(
    http: httpx.Client, model: str
) -> None:
    error = error_of(http.post("/v1/completions", json={"model": model, "prompt": "x" * (5 * 2**20)}), 400)
    assert error["param"] == "prompt"
    answer = http.post("/v1/embeddings", json={"model": model, "input": [[5]] * 2048})
    assert answer.status_code == 200 and len(answer.content) > 4 * 2**20
    assert len(answer.json()["data"]) == 2048


def test_unknown_paths_and_methods_answer_with_the_error_object_too(http: httpx.Client) -> None:
    assert "/v1/images" in error_of(http.post("/v1/images", json={}), 404)["message"]
    error_of(http.get(CHAT), 405)
