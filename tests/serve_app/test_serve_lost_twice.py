"""Requests that lose their replicas: those that got further go on, those that did not are stopped."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

from cluster.ray_private import logs_directory, replica_name_prefix
from serve_app.settings import REPLICA, ServiceConfig
from tests.processes import processes_running
from tests.serve_app.deployed_service import Deployed, deployed_beside
from tests.serve_app.support import error_of, wait_for

NAME = "twice"
HELLO = [{"role": "user", "content": "Tell me a story about a fox."}]
LONG = {"max_tokens": 2500, "ignore_eos": True, "temperature": 0}
ASKED: dict[str, dict[str, Any]] = {
    "chat/completions": {"messages": HELLO, "n": 2, **LONG},
    "completions": {"prompt": ["the sea", "a fox", "hi"], **LONG},
}
SEQUENCES = 5  # of both


@pytest.fixture(scope="module")
def service(service_config: ServiceConfig, url: str) -> Iterator[Deployed]:
    settings = {"min_replicas": 2, "max_replicas": 2, "num_blocks": 1024, "watchdog_timeout_s": 600}
    settings |= {"prefix_caching": False}  # usage tells of cached tokens
    with deployed_beside(service_config, url, NAME, **settings) as service:
        yield service


def replicas(service: Deployed) -> dict[str, dict[str, Any]]:
    """The replicas that answer, by their ids."""
    [model] = httpx.get(f"{service.url}/v1/cluster", timeout=60).json()["models"]
    return {each["id"]: each for each in model["replicas"] if "load" in each}


def both(service: Deployed) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = wait_for(lambda: len(now := replicas(service)) == 2 and now)
    return found


def process_of(replica: str) -> int:
    prefix = replica_name_prefix(f"{NAME}--qwen3-bundled", REPLICA)
    actor = ray.get_actor(f"{prefix}{replica}", namespace="serve")
    return int(ray.get(actor.__ray_call__.remote(lambda actor: os.getpid()), timeout=30))


def kill(replica: str) -> None:
    os.kill(process_of(replica), signal.SIGKILL)


def answer(service: Deployed, path: str) -> Any:
    """What an answer says, apart from its id and time."""
    told = httpx.post(f"{service.url}/v1/{path}", json=ASKED[path], timeout=300)
    assert told.is_success, told.text
    return told.json()["usage"], told.json()["choices"]


def running(service: Deployed) -> dict[str, int]:
    """How many sequences each replica runs."""
    return {name: each["load"]["num_requests_running"] for name, each in replicas(service).items()}


def test_answers_in_one_piece_that_lose_two_replicas_are_those_of_one(service: Deployed) -> None:
    def made(replica: str) -> int:
        return int(replicas(service)[replica]["load"]["generation_tokens"])

    both(service)
    expected = {path: answer(service, path) for path in ASKED}
    with ThreadPoolExecutor() as pool:
        asked = {path: pool.submit(answer, service, path) for path in ASKED}
        wait_for(lambda: sum(running(service).values()) == SEQUENCES)
        first, second = sorted(now := running(service), key=lambda each: now[each], reverse=True)
        assert now[first] > 0
        kill(first)
        wait_for(lambda: running(service).get(second) == SEQUENCES)
        before = made(second)
        wait_for(lambda: made(second) > before + 20 * SEQUENCES)  # so that all got further there
        assert not any(each.done() for each in asked.values())
        kill(second)
        for path, told in asked.items():
            assert told.result() == expected[path], path


def test_a_replica_that_gets_sigterm_hands_its_requests_over_and_goes_at_once(service: Deployed) -> None:
    both(service)
    expected = {path: answer(service, path) for path in ASKED}
    with ThreadPoolExecutor() as pool:
        asked = {path: pool.submit(answer, service, path) for path in ASKED}
        wait_for(lambda: sum(running(service).values()) == SEQUENCES)
        left = process_of(max(now := running(service), key=lambda each: now[each]))
        os.kill(left, signal.SIGTERM)
        wait_for(lambda: left not in processes_running("ServeReplica"), timeout_s=20)  # Serve would need 90
        for path, told in asked.items():
            assert told.result() == expected[path], path


def test_a_request_with_which_replicas_end_before_it_has_a_token_is_stopped_and_named(
    service: Deployed,
) -> None:
    both(service)
    stopped = [rank["pid"] for each in both(service).values() for rank in each["ranks"]]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(
                httpx.post,
                f"{service.url}/v1/completions",
                json={"prompt": "the sea", "max_tokens": 9},
                headers={"X-Request-Id": "deadly-7"},
                timeout=300,
            )
            for _ in range(2):
                kill(wait_for(lambda: with_request(service)))
            told = error_of(asked.result(), 500)
    finally:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    assert "2 replicas were lost while they ran this request" in told["message"]
    logs = [file.read_text(errors="replace") for file in Path(logs_directory()).rglob("*") if file.is_file()]
    assert any("request deadly-7 ran on 2 replicas when they were lost" in log for log in logs)
    both(service)


def with_request(service: Deployed) -> str:
    """A replica that has a request."""
    return next(
        (
            name
            for name, each in replicas(service).items()
            if each["load"]["num_requests_running"] + each["load"]["num_requests_waiting"]
        ),
        "",
    )
