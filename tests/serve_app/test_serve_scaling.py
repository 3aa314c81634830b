"""A deployed model whose replicas follow its load: up, down, to none and back, and where there is no room."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import ray
from ray.util import placement_group, remove_placement_group

from serve_app.settings import ServiceConfig
from tests.serve_app.command_line import qwen3_dist
from tests.serve_app.deployed_service import ASK, Deployed, deployed_beside
from tests.serve_app.support import wait_for

NAME = "scaled"
MANY_REQUESTS = {"max_replicas": 2, "target_ongoing_requests": 100}


@pytest.fixture(scope="module")
def deployed(service_config: ServiceConfig, url: str) -> Iterator[Deployed]:
    with deployed_beside(service_config, url, NAME) as service:
        yield service


@contextlib.contextmanager
def one_long_request_after_another(deployed: Deployed) -> Iterator[list[int]]:
    """A context in which one request runs at any time; gives the statuses of those that ended."""
    statuses: list[int] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            long = {"prompt": [len(statuses)] * 1500, "max_tokens": 500, "ignore_eos": True}
            statuses.append(deployed.ask(**long).status_code)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield statuses
    finally:
        done.set()
        asking.join()


@pytest.mark.parametrize(
    "target", [{"target_tokens": 700}, {"target_kv_usage": 0.4}, {"target_ttft_s": 0.01}]
)
def test_load_adds_a_replica_where_the_number_of_requests_would_not_and_its_end_removes_it(
    deployed: Deployed, target: dict[str, Any]
) -> None:
    deployed.change(**MANY_REQUESTS)
    engines = wait_for(lambda: len(e := deployed.engines()) == 1 and e)
    with one_long_request_after_another(deployed) as statuses:
        wait_for(lambda: len(statuses) > 2)
        assert deployed.engines() == engines
        deployed.change(**MANY_REQUESTS, **target)
        assert deployed.lines[1] == f"{NAME}--qwen3-bundled: takes its changed settings as it runs"
        wait_for(lambda: len(e := deployed.engines()) == 2 and e > engines)
    deployed.change(**MANY_REQUESTS, **target)
    assert deployed.lines[1] == f"{NAME}--qwen3-bundled: stays as it is"
    wait_for(lambda: len(deployed.engines()) == 1)
    assert set(statuses) == {200}


def test_requests_in_flight_add_a_replica_and_one_that_serve_removes_ends_what_it_has(
    deployed: Deployed,
) -> None:
    def losses() -> float:
        page = httpx.get(f"{deployed.url}/metrics", timeout=60).text
        return sum(map(float, re.findall(r"(?m)^qwen3_dist:request_replica_losses_total\{.*\} (.*)$", page)))

    def ask(number: int) -> str:
        long = {"max_tokens": 900, "ignore_eos": True, "temperature": 1.0, "seed": number}
        return str(deployed.ask(**long).json()["choices"][0]["text"])

    deployed.change()
    [first] = wait_for(lambda: len(e := deployed.engines()) == 1 and e)
    expected = [ask(number) for number in range(4)]
    lost, done = losses(), threading.Event()

    def keep_asking(number: int) -> None:
        while not done.is_set():
            assert ask(number) == expected[number]

    with ThreadPoolExecutor() as pool:
        asking = [pool.submit(keep_asking, number) for number in range(4)]
        try:
            deployed.change(max_replicas=2, target_ongoing_requests=1)
            both = wait_for(lambda: len(e := deployed.engines()) == 2 and e, timeout_s=90)
            assert first in both
            deployed.change()
            wait_for(lambda: len(deployed.engines()) == 1, timeout_s=90)
        finally:
            done.set()
        for each in asking:
            each.result()
    assert losses() == lost


def test_a_replica_without_room_is_told_with_what_it_lacks_and_the_other_one_serves_on(
    deployed: Deployed,
) -> None:
    def model() -> dict[str, Any]:
        view = httpx.get(f"{deployed.url}/v1/cluster", timeout=60).json()
        return dict(view["models"][0])

    deployed.change()
    wait_for(lambda: len(deployed.engines()) == 1)
    others = placement_group([{"CPU": ray.available_resources()["CPU"] - 0.01}])
    try:
        wait_for(lambda: others.wait(1))
        to = {"min_replicas": 2}
        assert httpx.post(f"{deployed.url}/v1/cluster/scale", json=to, timeout=60).is_success
        lacks = wait_for(lambda: model()["waits_for"])
        assert "there is too little CPU (" in lacks and "0.01 free)" in lacks
        assert model()["message"] == f"a replica waits for room for {lacks}"
        assert model()["status"] == "ready" and deployed.ask().is_success
        status = qwen3_dist("status", "--ray-address", ray.get_runtime_context().gcs_address)
        assert f"waits for room for {lacks}" in status.stdout, status.stderr
    finally:
        remove_placement_group(others)
    wait_for(lambda: len(deployed.engines()) == 2)
    assert model()["waits_for"] == ""


def test_a_model_that_nobody_asks_sleeps_and_the_next_request_wakes_it(deployed: Deployed) -> None:
    def ready() -> tuple[int, dict[str, str]]:
        answer = httpx.get(f"{deployed.url}/ready", timeout=60)
        return answer.status_code, answer.json().get("models", {})

    deployed.change()
    [awake] = deployed.engines()
    longest = deployed.longest()
    deployed.change(min_replicas=0, target_tokens=1000, target_kv_usage=0.9, target_ttft_s=5.0)
    assert deployed.lines[1] == f"{NAME}--qwen3-bundled: takes its changed settings as it runs"
    wait_for(lambda: ready() == (200, {"qwen3-bundled": "asleep"}), timeout_s=90)
    wait_for(lambda: deployed.engines() == set(), timeout_s=90)
    assert httpx.get(f"{deployed.url}/health", timeout=60).is_success and deployed.longest() == longest

    asked = {**ASK, "stream": True}
    with httpx.stream("POST", f"{deployed.url}/v1/completions", json=asked, timeout=120) as answer:
        assert answer.status_code == 200
        lines = [line for line in answer.iter_lines() if line]
    assert lines[0] == ": ping" and lines[-1] == "data: [DONE]"
    wait_for(lambda: ready()[1] == {"qwen3-bundled": "ready"})
    assert len(deployed.engines() - {awake}) == 1
