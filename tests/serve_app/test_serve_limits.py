"""A key, a time limit and room for one request at a time, on a real server: a second service beside the shared one."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from ray import serve

from serve_app.app import build_app
from serve_app.settings import REPLICA
from tests.checkpoints import write_reader
from tests.serve_app.support import SETTINGS, error_of, wait_for

NAME, KEY, TIMEOUT_S = "limited", "open sesame", 3
BEARER = {"authorization": f"Bearer {KEY}"}
COMPLETIONS, MESSAGES = "/v1/completions", "/v1/messages"
SHORT: dict[str, Any] = {"prompt": "hi", "max_tokens": 2}
MESSAGE: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
# With a sequence at a time in the engine, a quarter of a million steps one after the other.
ENDLESS: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 4000, "n": 64, "ignore_eos": True}
TOO_LONG = f"the request took longer than {TIMEOUT_S} seconds; ask for fewer tokens"


@pytest.fixture(scope="module")
def limited(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = {
        **SETTINGS,
        "model": str(write_reader(tmp_path_factory.mktemp("reader"))),
        "model_name": NAME,
        "layout": "tp=1",
        "cpus_per_rank": 0.05,
        "max_replicas": 1,
        "target_ongoing_requests": 1,
        "max_ongoing_requests": 1,
        "max_queued_requests": 1,
        "max_num_seqs": 1,
        "request_timeout_s": TIMEOUT_S,
        "body_timeout_s": 1,
        "api_key": KEY,
    }
    serve.run(build_app(settings), name=NAME, route_prefix=f"/{NAME}")
    try:
        address = f"{url}/{NAME}"
        # The first request of a cold server may take longer than later ones are allowed to.
        wait_for(lambda: httpx.post(address + COMPLETIONS, json=SHORT, headers=BEARER, timeout=60).is_success)
        yield address
    finally:
        serve.delete(NAME)


@pytest.fixture
def stranger(limited: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=limited, timeout=60) as client:
        yield client


@pytest.fixture
def friend(limited: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=limited, timeout=60, headers=BEARER) as client:
        yield client


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer sesame"}, {"x-api-key": "sesame"}])
def test_without_the_key_a_request_is_401_in_the_form_of_its_api(
    stranger: httpx.Client, headers: dict[str, str]
) -> None:
    refused = stranger.post(COMPLETIONS, json=SHORT, headers=headers)
    assert error_of(refused, 401)["code"] == "invalid_api_key"
    assert refused.headers["www-authenticate"] == "Bearer"
    error_of(stranger.get("/v1/models", headers=headers), 401)
    refused = stranger.post(MESSAGES, json=MESSAGE, headers=headers)
    assert (refused.status_code, refused.json()["type"]) == (401, "error")
    assert refused.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("headers", [BEARER, {"x-api-key": KEY}])
def test_the_key_may_be_shown_as_openais_clients_do_or_as_anthropics_do(
    stranger: httpx.Client, headers: dict[str, str]
) -> None:
    assert stranger.post(COMPLETIONS, json=SHORT, headers=headers).json()["object"] == "text_completion"
    assert stranger.post(MESSAGES, json=MESSAGE, headers=headers).json()["type"] == "message"


def test_only_health_and_version_are_told_without_a_key(stranger: httpx.Client) -> None:
    for path in ("/health", "/version"):
        assert stranger.get(path).status_code == 200
    for path in ("/docs", "/openapi.json", "/nothing"):
        error_of(stranger.get(path), 401)
    error_of(stranger.post("/tokenize", json={"prompt": "hi"}), 401)
    assert stranger.get("/docs", headers=BEARER).status_code == 200


def test_a_body_that_dribbles_is_408_and_its_connection_is_closed(limited: str) -> None:
    def dribble() -> Iterator[bytes]:
        while True:
            time.sleep(0.1)
            yield b" "

    headers = {**BEARER, "content-type": "application/json"}
    answer = httpx.post(limited + COMPLETIONS, content=dribble(), headers=headers, timeout=60)
    assert "took longer than 1 seconds to arrive" in error_of(answer, 408)["message"]
    assert answer.headers["connection"] == "close"


def test_a_request_whose_time_is_up_is_408_and_makes_room_for_the_next(friend: httpx.Client) -> None:
    error = error_of(friend.post(COMPLETIONS, json=ENDLESS), 408)
    assert (error["message"], error["type"]) == (TOO_LONG, "invalid_request_error")
    assert friend.post(COMPLETIONS, json=SHORT).status_code == 200


def test_a_stream_whose_time_is_up_ends_with_an_error_event(friend: httpx.Client) -> None:
    answer = friend.post(COMPLETIONS, json={**ENDLESS, "stream": True})
    assert answer.status_code == 200
    *parts, error, done = answer.text.strip().split("\n\n")
    assert parts and all("choices" in json.loads(part.removeprefix("data: ")) for part in parts)
    assert json.loads(error.removeprefix("event: error\ndata: "))["error"]["message"] == TOO_LONG
    assert done == "data: [DONE]"
    assert friend.post(COMPLETIONS, json=SHORT).status_code == 200


def test_more_requests_than_may_wait_are_429_and_those_that_wait_are_answered(limited: str) -> None:
    async def crowd() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=limited, timeout=60, headers=BEARER) as client:
            async with client.stream("POST", COMPLETIONS, json={**ENDLESS, "stream": True}) as running:
                lines = running.aiter_lines()  # dropping them would hang up
                assert (await anext(lines)).startswith("data:")
                asked: list[asyncio.Task[httpx.Response]] = []
                while not any(task.done() for task in asked):  # who waits is not answered yet
                    asked.append(asyncio.create_task(client.post(COMPLETIONS, json=SHORT)))
                    await asyncio.sleep(0.05)
            return await asyncio.gather(*asked)

    answers = asyncio.run(crowd())
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert error_of(answer, 429)["code"] == "rate_limit_exceeded"
            assert int(answer.headers["retry-after"]) > 0


def test_what_waits_waits_in_the_engine(limited: str, friend: httpx.Client) -> None:
    """Serve's router would look for room twice a second, and engines would idle."""
    replicas = serve.get_deployment_handle(REPLICA, NAME)

    async def most_in_engine() -> int:
        """Sequences that the engine has while one request of many runs and another waits."""
        wait_for(lambda: friend.post(COMPLETIONS, json=SHORT).is_success)  # earlier requests have ended
        async with (
            httpx.AsyncClient(base_url=limited, timeout=60, headers=BEARER) as client,
            client.stream("POST", COMPLETIONS, json={**ENDLESS, "stream": True}) as running,
        ):
            lines = running.aiter_lines()
            assert (await anext(lines)).startswith("data:")
            waiting = asyncio.create_task(client.post(COMPLETIONS, json={**ENDLESS, "n": 1}))
            most = 0
            while most <= ENDLESS["n"] and not waiting.done():
                (stats,) = await replicas.broadcast("stats").results_async()
                most = max(most, stats.num_running + stats.num_waiting)
            waiting.cancel()
            return most

    tries = (asyncio.run(most_in_engine()) for _ in range(5))  # a busy machine may take up a request's time
    assert any(most == ENDLESS["n"] + 1 for most in tries)


def test_documents_are_ranked_and_scored(friend: httpx.Client) -> None:
    query, documents = "What colour is the sea?", ["Foxes are small.", "The sea is blue."]
    ranked = friend.post("/v1/rerank", json={"query": query, "documents": documents}).json()["results"]
    scores = [result["relevance_score"] for result in ranked]
    assert scores == sorted(scores, reverse=True) and all(0 < score < 1 for score in scores)
    assert all(result["document"] == {"text": documents[result["index"]]} for result in ranked)
    scored = friend.post("/v1/score", json={"text_1": query, "text_2": documents}).json()["data"]
    assert {each["index"]: pytest.approx(each["score"], abs=1e-5) for each in scored} == {
        result["index"]: result["relevance_score"] for result in ranked
    }
