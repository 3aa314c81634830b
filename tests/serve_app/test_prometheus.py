"""A real Prometheus scrapes a loaded service: every query of ours, of Ray's dashboard and of Ray's policy has an
answer. Slow; `make dashboards` runs it."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
import yaml

from tests.serve_app.conftest import ADAPTER
from tests.serve_app.consumers import GATEWAY, ray_dashboard, ttft_policy
from tests.serve_app.support import free_port, wait_for
from tests.serve_app.test_dashboards import ALERTS, alert_rules, queries

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
INTERVAL_S = 1
LOAD_S = 75.0
# Queries whose answer is empty in a service that is well: no condition of an alert holds.
EMPTY = set(alert_rules())


class Prometheus:
    """A server that scrapes the service and Ray's agent."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, text: str) -> list[dict[str, Any]]:
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": text}, timeout=30).json()
        assert answer["status"] == "success", answer
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def get(self, path: str) -> Any:
        return httpx.get(f"{self.url}/api/v1/{path}", timeout=30).raise_for_status().json()["data"]


@pytest.fixture
def prometheus(url: str, tmp_path: Path) -> Iterator[Prometheus]:
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("prometheus is missing; install Debian's package prometheus")
    config = yaml.safe_load((ALERTS.parent / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": f"{INTERVAL_S}s", "evaluation_interval": f"{INTERVAL_S}s"}
    config["rule_files"] = [str(ALERTS)]
    [service, agents] = config["scrape_configs"]
    service["static_configs"] = [{"targets": [url.removeprefix("http://")]}]
    [node] = [node for node in ray.nodes() if node["Alive"]]
    del agents["file_sd_configs"]  # no dashboard process runs here to write them
    agents["static_configs"] = [{"targets": [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"]}]
    file, address = tmp_path / "prometheus.yml", f"127.0.0.1:{free_port()}"
    file.write_text(yaml.safe_dump(config))
    command = [binary, f"--config.file={file}", f"--web.listen-address={address}"]
    command += [f"--storage.tsdb.path={tmp_path / 'data'}", "--log.level=warn"]
    with subprocess.Popen(command) as process:
        try:
            server = Prometheus(f"http://{address}")
            wait_for(lambda: is_up(server))
            yield server
        finally:
            process.terminate()


def is_up(server: Prometheus) -> bool:
    try:
        return [target["health"] for target in server.get("targets")["activeTargets"]] == ["up", "up"]
    except httpx.HTTPError:  # nobody listens yet, or 503 while it starts
        return False


@contextmanager
def load(client: openai.OpenAI, model: str) -> Iterator[list[int]]:
    """Four clients that stream answers of the model and of an adapter, and the number of answers so far."""
    ending, answers = threading.Event(), [0]

    def ask(name: str) -> None:
        while not ending.is_set():
            stream = client.chat.completions.create(
                model=name,
                messages=[{"role": "user", "content": "Tell me a story about a fox."}],
                max_tokens=30,
                stream=True,
            )
            for _ in stream:
                pass
            answers[0] += 1

    threads = [threading.Thread(target=ask, args=(name,)) for name in (model, ADAPTER) * 2]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        ending.set()
        for thread in threads:
            thread.join()


def asked() -> dict[str, str]:
    """Our queries as Grafana would ask them."""
    found = {}
    for place, query in queries().items():
        if not place.startswith("$"):
            query = query.replace("$__rate_interval", "30s")
            found[place] = query.replace("$model", ".*").replace("$replica", ".*")
    return found


def test_every_query_has_an_answer_under_load(
    prometheus: Prometheus, client: openai.OpenAI, model: str, tmp_path: Path
) -> None:
    began = time.monotonic()
    with load(client, model) as answers:
        wait_for(lambda: time.monotonic() - began > LOAD_S, 2 * LOAD_S)
        ours = {place: prometheus.query(query) for place, query in asked().items()}
        rays = {place: prometheus.query(query) for place, query in ray_dashboard().items()}
        ttft = prometheus.query(ttft_policy(model))
        gateway = {name: prometheus.query(name) for name in GATEWAY}
    print(f"\n{answers[0]} answers; {len(ours)} queries of ours, {len(rays)} of Ray's dashboard")
    print("ours without an answer:", sorted(place for place, rows in ours.items() if not rows))
    print("Ray's without an answer:", sorted(place for place, rows in rays.items() if not rows))
    print("p99 time to first token by Ray's policy:", ttft)
    assert answers[0] > 10
    assert {place for place, rows in ours.items() if not rows} <= EMPTY
    assert not [place for place, rows in rays.items() if not rows]
    [row] = ttft
    assert 0 < float(row["value"][1]) < 60
    assert all(gateway.values())
    numbers = [float(row["value"][1]) for place in ours for row in ours[place]]
    assert numbers and not [number for number in numbers if number == float("inf")]


def test_alerts_are_loaded_and_their_rules_are_well(prometheus: Prometheus) -> None:
    def rules() -> list[dict[str, Any]] | None:
        found = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
        return found if found and all(rule["health"] == "ok" for rule in found) else None

    assert {rule["name"] for rule in wait_for(rules)} == set(alert_rules())
    assert json.dumps(prometheus.get("alerts"))
