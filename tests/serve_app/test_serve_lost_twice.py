"""Requests that lose their replicas: those that got further go on, those that did not are stopped."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

from cluster.ray_private import logs_directory, replica_name_prefix
from serve_app.replica.record import RequestRecord
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
SHORT = {"max_tokens": 20, "ignore_eos": True, "temperature": 0}
QUEUED: list[tuple[str, dict[str, Any]]] = [
    ("chat/completions", {"messages": HELLO, **SHORT}),
    ("completions", {"prompt": ["the sea", "a fox"], **SHORT}),
    ("completions", {"prompt": "the sea", "n": 2, **SHORT}),
    ("embeddings", {"input": ["the sea", "a fox"]}),
]


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


def in_replica(replica: str, call: Callable[[Any], Any]) -> Any:
    """What `call` returns in the process of a replica."""
    prefix = replica_name_prefix(f"{NAME}--qwen3-bundled", REPLICA)
    actor = ray.get_actor(f"{prefix}{replica}", namespace="serve")
    return ray.get(actor.__ray_call__.remote(call), timeout=30)


def process_of(replica: str) -> int:
    return int(in_replica(replica, lambda actor: os.getpid()))


def told_to_wait(replica: str) -> int:
    """The number of requests of which a replica has told that they only wait there."""
    return int(
        in_replica(
            replica,
            lambda actor: sum(each._waits for each in gc.get_objects() if type(each) is RequestRecord),
        )
    )


def kill(replica: str) -> None:
    os.kill(process_of(replica), signal.SIGKILL)


def answer(service: Deployed, path: str, body: dict[str, Any] | None = None) -> Any:
    """What an answer says, apart from its id and time."""
    told = httpx.post(f"{service.url}/v1/{path}", json=body or ASKED[path], timeout=300)
    assert told.is_success, told.text
    return {name: value for name, value in told.json().items() if name not in ("id", "created")}


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


@contextlib.contextmanager
def stopped_ranks(service: Deployed) -> Iterator[list[str]]:
    """The replicas, no step of which ends."""
    now = both(service)
    stopped = [rank["pid"] for each in now.values() for rank in each["ranks"]]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield list(now)
    finally:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def test_requests_that_only_wait_at_two_replicas_that_end_are_answered(service: Deployed) -> None:
    """A step holds the first request of each replica; those that come later wait there."""
    both(service)
    expected = [answer(service, *each) for each in QUEUED]
    asked: list[Future[Any]] = []
    with ThreadPoolExecutor(32) as pool, stopped_ranks(service) as (first, second):

        def placed() -> bool:
            begun = len(with_request(service))
            return begun + told_to_wait(first) + told_to_wait(second) == len(asked)

        for each in islice(cycle(QUEUED), 32):
            asked.append(pool.submit(answer, service, *each))
            wait_for(placed)
            if len(with_request(service)) == 2 and len(asked) >= 2 + len(QUEUED):
                break
        kill(first)
        wait_for(lambda: told_to_wait(second) == len(asked) - 1)
        assert not any(each.done() for each in asked)
        kill(second)
        for number, told in enumerate(asked):
            assert told.result() == expected[number % len(QUEUED)], QUEUED[number % len(QUEUED)]


def test_a_request_with_which_replicas_end_before_it_has_a_token_is_stopped_and_named(
    service: Deployed,
) -> None:
    with ThreadPoolExecutor() as pool, stopped_ranks(service):
        asked = pool.submit(
            httpx.post,
            f"{service.url}/v1/completions",
            json={"prompt": "the sea", "max_tokens": 9},
            headers={"X-Request-Id": "deadly-7"},
            timeout=300,
        )
        for _ in range(2):
            kill(wait_for(lambda: with_request(service))[0])
        told = error_of(asked.result(), 500)
    assert "2 replicas were lost while they ran this request" in told["message"]
    logs = [file.read_text(errors="replace") for file in Path(logs_directory()).rglob("*") if file.is_file()]
    assert any("request deadly-7 ran on 2 replicas when they were lost" in log for log in logs)
    both(service)


def with_request(service: Deployed) -> list[str]:
    """The replicas whose engine has a request."""
    return [
        name
        for name, each in replicas(service).items()
        if each["load"]["num_requests_running"] + each["load"]["num_requests_waiting"]
    ]
