"""What happens around requests: clients that leave, load that comes and goes, ranks that die."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterable
from typing import Any

import httpx
import openai
import pytest
from ray import serve

from qwen3_dist.protocol.outputs import EngineStats
from serve_app.app import build_app
from tests.processes import processes_running
from tests.serve_app.support import SETTINGS, wait_for

LONG = 4000  # tokens; an abandoned request that ran on would take as many steps


def long_request(model: str, **fields: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": [5, 6, 7], "max_tokens": LONG, "temperature": 0, "ignore_eos": True}
    return {**body, **fields}


def rank_processes() -> list[int]:
    return processes_running("ray::RankActor")


def total_steps(stats: list[EngineStats]) -> int:
    return sum(reading.steps for reading in stats)


def test_a_client_that_leaves_a_stream_frees_its_blocks(
    http: httpx.Client, model: str, stats: Callable[[], list[EngineStats]], idle: Callable[[], bool]
) -> None:
    before = total_steps(stats())
    with http.stream("POST", "/v1/completions", json=long_request(model, stream=True)) as answer:
        lines = answer.iter_lines()  # dropping them would hang up
        assert next(lines).startswith("data:")
        assert not idle()
    wait_for(idle)
    assert total_steps(stats()) - before < LONG


def test_a_client_that_gives_up_waiting_frees_its_blocks(
    url: str, model: str, stats: Callable[[], list[EngineStats]], idle: Callable[[], bool]
) -> None:
    before = total_steps(stats())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json=long_request(model), timeout=1)
    wait_for(idle)
    assert 0 < total_steps(stats()) - before < LONG


def test_a_stop_string_ends_the_sequence_in_the_engine_too(
    client: openai.OpenAI, model: str, stats: Callable[[], list[EngineStats]], idle: Callable[[], bool]
) -> None:
    prompt = "Once upon a time"
    text = client.completions.create(model=model, prompt=prompt, max_tokens=8, temperature=0).choices[0].text
    before = total_steps(stats())
    answer = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=LONG,
        temperature=0,
        stop=text[-1],
        extra_body={"ignore_eos": True},
    )
    wait_for(idle)
    assert answer.choices[0].finish_reason == "stop"
    assert total_steps(stats()) - before < LONG


def test_load_adds_a_replica_and_idleness_removes_it(
    url: str, model: str, stats: Callable[[], list[EngineStats]]
) -> None:
    enough = threading.Event()

    def keep_asking() -> None:
        while not enough.is_set():
            with httpx.stream(
                "POST", f"{url}/v1/completions", json=long_request(model, stream=True)
            ) as answer:
                for _ in answer.iter_lines():
                    if enough.is_set():
                        return

    clients = [threading.Thread(target=keep_asking) for _ in range(6)]
    for client in clients:
        client.start()
    try:
        wait_for(lambda: len(stats()) == 2)
    finally:
        enough.set()
        for client in clients:
            client.join()
    wait_for(lambda: len(stats()) == 1)
    wait_for(lambda: len(rank_processes()) == 2)


def test_the_death_of_a_rank_costs_no_request_and_changes_no_text(
    url: str, client: openai.OpenAI, model: str
) -> None:
    def ask() -> str:
        return client.completions.create(model=model, prompt="hi", temperature=0).choices[0].text

    def text_of(events: Iterable[str]) -> str:
        data = [event.removeprefix("data: ") for event in events if event.startswith("data: {")]
        return "".join(json.loads(each)["choices"][0]["text"] for each in data)

    def healthy() -> bool:
        return httpx.get(f"{url}/health", timeout=30).status_code == 200

    wait_for(healthy)
    expected = ask()
    whole = httpx.post(
        f"{url}/v1/completions", json=long_request(model, max_tokens=1500), timeout=120
    ).json()["choices"][0]["text"]
    waiting: list[httpx.Response] = []
    unary = threading.Thread(
        target=lambda: waiting.append(
            httpx.post(f"{url}/v1/completions", json=long_request(model, max_tokens=1500), timeout=120)
        )
    )
    unary.start()
    with httpx.stream(
        "POST", f"{url}/v1/completions", json=long_request(model, max_tokens=1500, stream=True), timeout=120
    ) as stream:
        lines = (line for line in stream.iter_lines() if line)
        first = next(lines)
        ranks = rank_processes()
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        *others, done = lines
    assert done == "data: [DONE]"
    assert text_of([first, *others]) == whole
    unary.join()
    assert waiting[0].status_code == 200, waiting[0].text
    assert waiting[0].json()["choices"][0]["text"] == whole
    wait_for(healthy)
    assert ask() == expected
    assert len(set(ranks) & set(rank_processes())) == 1  # the other one kept its process


def test_build_app_serves_beside_others_through_serve_run(url: str) -> None:
    settings = {
        **SETTINGS,
        "layout": "tp=1",
        "max_replicas": 1,
        "cpus_per_rank": "0.05",
        "model_name": "second",
    }
    serve.run(build_app(settings), name="second", route_prefix="/second")
    try:
        with openai.OpenAI(base_url=f"{url}/second/v1", api_key="none", max_retries=0) as second:
            assert second.completions.create(model="second", prompt="hi", max_tokens=2).choices[0].text
    finally:
        serve.delete("second")
