"""A service with several ingresses: what one knows the others know, and none of them is needed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.ray_private import deployment_handle
from qwen3_dist.errors import ResourceError
from serve_app.ingress.cluster_view import IngressState
from serve_app.ingress.peers import METHOD
from serve_app.launch.deploy import deploy, stop
from serve_app.settings import INGRESS, ServiceConfig, read_service_config
from tests.processes import processes_running
from tests.serve_app.support import SETTINGS, wait_for

NAME = "ingresses"
MODEL = {
    **SETTINGS,
    "layout": "tp=1",
    "cpus_per_rank": 0.05,
    "ranks_per_host": 2,
    "num_blocks": 1024,
    "max_replicas": 1,
    "name": NAME,
    "route_prefix": f"/{NAME}",
}
ASK = {"prompt": "hi", "max_tokens": 2}


class Ingresses:
    """The service as clients see it, and each of its ingresses as another one sees it."""

    def __init__(self, shared: ServiceConfig, url: str) -> None:
        self._port = shared.endpoint.port
        self.url = f"{url}/{NAME}"
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def change(self, **settings: Any) -> None:
        deploy(read_service_config({**MODEL, "port": self._port, **settings}), print)

    def ask(self, name: str, *arguments: Any) -> dict[str, Any]:
        """What each ingress answers to a call of `name` by another one, by its id."""
        call = deployment_handle(INGRESS, NAME).broadcast(METHOD, "a test", "", name, arguments)
        answers = call.results(timeout_s=30, return_exceptions=True)
        return {each.ingress: each.value for each in answers if not isinstance(each, BaseException)}

    def states(self, count: int) -> dict[str, IngressState]:
        """The state of each ingress, once there are `count`."""
        found: dict[str, IngressState] = wait_for(lambda: len(s := self.ask("state")) == count and s)
        return found

    def engines(self) -> set[int]:
        """The processes of all ranks, by which a reload shows."""
        answer = self.http.get("/v1/cluster/ranks").json()
        return {rank["pid"] for replica in answer["data"] for rank in replica["ranks"]}

    def requests_by_ingress(self) -> dict[str, float]:
        """Answered completions by ingress, as one scrape tells them."""
        page = self.http.get("/metrics")
        counts: dict[str, float] = {}
        for family in text_string_to_metric_families(page.text):
            for sample in family.samples:
                if sample.name == "qwen3_dist:http_requests_in_flight":
                    counts.setdefault(sample.labels["ingress"], 0.0)
                if (
                    sample.name == "qwen3_dist:http_requests_total"
                    and sample.labels["route"] == "/v1/completions"
                ):
                    counts[sample.labels["ingress"]] = sample.value
        return counts


class Stream:
    """A long answer, streamed or at once, that a thread reads to its end; `is_whole` tells whether the end came."""

    def __init__(self, url: str, tokens: int = 900, stream: bool = True) -> None:
        self.begun, self.is_whole, self.status = threading.Event(), False, 0
        self.error = ""
        self._leaving = threading.Event()
        body = {**ASK, "ignore_eos": True, "max_tokens": tokens, "stream": stream}
        self._thread = threading.Thread(target=self._read, args=(url, body, stream))
        self._thread.start()

    def _read(self, url: str, body: dict[str, Any], stream: bool) -> None:
        with (
            contextlib.suppress(httpx.HTTPError),
            httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as answer,
        ):
            self.status = answer.status_code
            for line in answer.iter_lines():
                self.begun.set()
                if self._leaving.is_set():
                    return
                if line.startswith('data: {"error"'):
                    self.error = json.loads(line.removeprefix("data: "))["error"]["message"]
                self.is_whole = line == "data: [DONE]" or (self.is_whole or not stream)
        self.begun.set()

    def leave(self) -> None:
        """Hangs up."""
        self._leaving.set()
        self._thread.join(timeout=120)

    def ended_whole(self) -> bool:
        self._thread.join(timeout=120)
        return self.is_whole and not self.error


@pytest.fixture(scope="module")
def service(service_config: ServiceConfig, url: str) -> Iterator[Ingresses]:
    service = Ingresses(service_config, url)
    service.change(ingress_replicas=2)
    try:
        yield service
    finally:
        with contextlib.suppress(ResourceError):
            stop(NAME, print, lambda: True)


def test_each_scrape_and_each_view_has_all_ingresses(service: Ingresses) -> None:
    ids = set(service.states(2))
    for _ in range(12):
        assert service.http.post("/v1/completions", json=ASK).is_success
    assert all(state.in_flight == 0 for state in service.states(2).values())
    first: set[str] = set()

    def both_have_answered() -> bool:
        counts = service.requests_by_ingress()
        assert set(counts) == ids and sum(counts.values()) == 12
        view = service.http.get("/v1/cluster").json()["ingress"]
        assert {each["id"] for each in view["replicas"]} == ids
        limits = [each["limit"] for each in view["replicas"]]
        assert view["limit"] == sum(limits) == 1256 and limits[0] == limits[1]
        first.add(view["replicas"][0]["id"])  # the one that was asked
        return first == ids

    wait_for(both_have_answered)


def test_a_stored_response_is_in_each_ingress_until_it_is_deleted(service: Ingresses) -> None:
    body = {"input": "Hello!", "max_output_tokens": 3}
    answer = service.http.post("/v1/responses", json=body).json()
    assert [answer["id"] in ids for ids in service.ask("ids").values()] == [True, True]
    with service.http.stream("POST", "/v1/responses", json={**body, "stream": True}) as stream:
        stream.read()
    assert [len(ids) for ids in service.ask("ids").values()] == [2, 2]
    following = {**body, "previous_response_id": answer["id"]}
    for _ in range(6):
        assert service.http.get(f"/v1/responses/{answer['id']}").json() == answer
        assert service.http.post("/v1/responses", json=following).is_success
    assert service.http.delete(f"/v1/responses/{answer['id']}").is_success
    for _ in range(6):
        assert service.http.get(f"/v1/responses/{answer['id']}").status_code == 404
        assert service.http.post("/v1/responses", json=following).status_code == 404


def test_a_killed_ingress_takes_its_own_streams_with_it_and_nothing_else(service: Ingresses) -> None:
    ids = set(service.states(2))
    stored = service.http.post("/v1/responses", json={"input": "Hello!", "max_output_tokens": 3}).json()
    engines = service.engines()
    streams: list[Stream] = []
    while not streams or min(state.in_flight for state in service.states(2).values()) < 2:
        streams.append(Stream(service.url))
        assert streams[-1].begun.wait(60) and len(streams) < 40
    before = service.states(2)
    asked = [Stream(service.url, 200, stream=False) for _ in range(8)]
    wait_for(lambda: sum(state.in_flight for state in service.states(2).values()) == len(streams) + 8)
    victim, _ = processes_running(f"ServeReplica:{NAME}:{INGRESS}")
    os.kill(victim, signal.SIGKILL)
    statuses = [service.http.post("/v1/completions", json=ASK).status_code for _ in range(10)]
    found = [service.http.get(f"/v1/responses/{stored['id']}").status_code for _ in range(6)]
    whole = [stream.ended_whole() for stream in streams]
    after = service.states(2)
    [left], [new] = ids & set(after), set(after) - ids
    assert [each.status for each in asked if each.ended_whole()] == [200] * 8
    print(f"\n{whole.count(True)} of {len(whole)} streams went on; {statuses}; {found}")
    assert before[left].in_flight <= whole.count(True) < len(streams)
    assert statuses == [200] * 10 and found == [200] * 6
    broken = {stream.error for stream, is_whole in zip(streams, whole, strict=True) if not is_whole}
    assert broken == {"the process that had this request was lost; send it again"}
    assert service.engines() == engines
    wait_for(lambda: stored["id"] in service.ask("ids")[new])
    counts = wait_for(lambda: len(c := service.requests_by_ingress()) == 2 and c)
    assert counts[left] >= before[left].in_flight
    assert all(state.in_flight == 0 for state in service.states(2).values())


def test_load_adds_an_ingress_and_idleness_removes_it_and_no_engine_notices(service: Ingresses) -> None:
    engines = service.engines()
    stored = service.http.post("/v1/responses", json={"input": "Hello!", "max_output_tokens": 3}).json()
    ids = set(service.states(2))
    service.change(ingress_replicas=1, max_ingress_replicas=2, ingress_target_requests=2)
    assert len(service.states(1).keys() & ids) == 1  # it is one of the two that ran
    [alone] = service.states(1).values()
    assert alone.limit == 1256
    streams = [Stream(service.url, 3500) for _ in range(5)]
    both = service.states(2)
    limits = wait_for(lambda: {state.limit for state in service.states(2).values()} == {628})
    assert limits and alone.ingress in both
    wait_for(lambda: all(stored["id"] in ids for ids in service.ask("ids").values()))
    for stream in streams:
        stream.leave()
    [left] = service.states(1).values()
    wait_for(lambda: service.ask("state")[left.ingress].limit == 1256)
    assert service.http.get(f"/v1/responses/{stored['id']}").json() == stored
    assert service.engines() == engines


def test_a_request_of_the_only_ingress_is_answered_by_its_successor(service: Ingresses) -> None:
    service.change(ingress_replicas=1)
    [before] = service.states(1)
    asked = [Stream(service.url, 200, stream=False) for _ in range(3)]
    wait_for(lambda: service.states(1)[before].in_flight == 3)
    [victim] = processes_running(f"ServeReplica:{NAME}:{INGRESS}")
    os.kill(victim, signal.SIGKILL)
    assert [each.status for each in asked if each.ended_whole()] == [200] * 3
    [after] = service.states(1)
    assert after != before


def test_all_ingresses_drain(service: Ingresses) -> None:
    service.change(ingress_replicas=2)
    service.states(2)
    streams = [Stream(service.url) for _ in range(4)]
    assert all(stream.begun.wait(60) for stream in streams)
    statuses: list[int] = []
    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        statuses.extend(service.http.post("/v1/completions", json=ASK).status_code for _ in range(8))

    stop(NAME, report, lambda: False, timeout_s=60)
    assert all(stream.ended_whole() for stream in streams)
    assert lines[0].startswith("refusing new requests; 4 running sequence(s)") and set(statuses) == {503}
