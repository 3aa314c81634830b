"""The metrics of the real service under load, at /metrics and at Ray's agent: every series that others read, with the
numbers that clients counted."""

from __future__ import annotations

import os
import signal
import urllib.request
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
import ray

from serve_app.settings import REPLICA, ServiceConfig
from tests.processes import processes_running
from tests.serve_app.conftest import ADAPTER, METRICS_PERIOD_S
from tests.serve_app.consumers import GATEWAY, KUBERAY, names_in, ray_dashboard, ttft_policy
from tests.serve_app.support import wait_for
from tests.serve_app.test_metrics import samples, total

Page = Callable[[], bytes]


def agent_page() -> bytes:
    """What Ray's metrics agent of this node tells Prometheus."""
    [node] = [node for node in ray.nodes() if node["Alive"]]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=30) as answer:
        page: bytes = answer.read()
    return page


@pytest.fixture
def page(http: httpx.Client) -> Page:
    def read() -> bytes:
        answer = http.get("/metrics")
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        return answer.content

    return read


def load(client: openai.OpenAI, http: httpx.Client, model: str) -> dict[str, int]:
    """Answers, streamed and whole, of the model and an adapter, one of which is left early; the tokens of the others
    as clients count them."""
    prompt_tokens = completion_tokens = 0
    messages: Any = [{"role": "user", "content": "Tell me a story about a fox."}]
    for name, stream in ((model, True), (ADAPTER, True), (model, False)):
        fields: Any = {
            "model": name,
            "messages": messages,
            "max_tokens": 20,
            "extra_body": {"ignore_eos": True},
        }
        if stream:
            parts = client.chat.completions.create(
                **fields, stream=True, stream_options={"include_usage": True}
            )
            usage = [part.usage for part in parts if part.usage][-1]
        else:
            usage = client.chat.completions.create(**fields).usage
        assert usage is not None
        prompt_tokens += usage.prompt_tokens
        completion_tokens += usage.completion_tokens
    body = {"model": model, "prompt": "Once", "max_tokens": 12, "ignore_eos": True}
    answer = http.post("/v1/completions", json=body).json()
    prompt_tokens += answer["usage"]["prompt_tokens"]
    completion_tokens += answer["usage"]["completion_tokens"]
    with http.stream("POST", "/v1/completions", json={**body, "max_tokens": 1500, "stream": True}) as left:
        next(left.iter_bytes())
    prompt_tokens += answer["usage"]["prompt_tokens"]
    return {"prompt": prompt_tokens, "completion": completion_tokens}


def replicas_in(page: bytes) -> set[str]:
    return {dict(labels)["replica"] for name, labels in samples(page) if name == "qwen3_dist:steps_total"}


def before_and_after(
    page: Page, run: Callable[[], Any], until: Callable[[bytes], bool]
) -> tuple[bytes, bytes, Any]:
    before = page()
    result = run()
    return before, wait_for(lambda: (now := page()) and until(now) and now), result


def test_the_counts_are_those_of_the_clients(
    client: openai.OpenAI, http: httpx.Client, model: str, page: Page, idle: Callable[[], bool]
) -> None:
    load(client, http, model)  # so that every series exists before it is compared
    wait_for(idle)
    wait_for(lambda: len(replicas_in(page())) == 1)  # a replica that is removed takes its counts along

    def ended(now: bytes, reason: str) -> float:
        return total(now, "vllm:request_success_total", finished_reason=reason)

    aborted = ended(page(), "abort")
    before, after, tokens = before_and_after(
        page, lambda: load(client, http, model), lambda now: ended(now, "abort") == aborted + 1 and idle()
    )
    after = page()

    def grown(name: str, **labels: str) -> float:
        return total(after, name, **labels) - total(before, name, **labels)

    assert grown("vllm:request_success_total", finished_reason="length") == 4
    assert grown("vllm:request_success_total", finished_reason="error") == 0
    assert grown("vllm:prompt_tokens_total") == tokens["prompt"]
    assert grown("vllm:prefix_cache_queries_total") == tokens["prompt"]
    assert 0 < grown("vllm:prefix_cache_hits_total") < tokens["prompt"]  # the prompts were asked before
    generated = grown("vllm:generation_tokens_total")
    assert generated > tokens["completion"]  # the stream that was left has some too
    assert grown("vllm:request_generation_tokens_sum") == tokens["completion"]
    assert grown("vllm:request_prompt_tokens_count") == 4
    assert grown("vllm:time_to_first_token_seconds_count") == 5
    assert tokens["completion"] - 4 <= grown("vllm:inter_token_latency_seconds_count") <= generated - 5
    assert 0 < grown("vllm:e2e_request_latency_seconds_sum") < 400
    assert grown("qwen3_dist:steps_total") >= 20
    assert grown("qwen3_dist:step_tokens_total") >= generated - 5
    # tp=2: an all-reduce of the embedding, after attention, and (by all-gather) for the experts, in fp32.
    assert grown("qwen3_dist:wire_bytes_total", exchange="tensor") > 0
    assert grown("qwen3_dist:wire_bytes_total", exchange="experts") > 0
    assert grown("qwen3_dist:wire_bytes_total", exchange="pipeline") == 0
    assert grown("qwen3_dist:dispatched_tokens_total") >= grown("qwen3_dist:step_tokens_total")
    assert grown("qwen3_dist:rank_wait_seconds_total", waits_for="requests") >= 0
    posts = {"route": "/v1/chat/completions", "method": "POST", "status": "200"}
    assert grown("qwen3_dist:http_requests_total", **posts) == 3
    assert total(after, "vllm:num_requests_running") == total(after, "vllm:num_requests_waiting") == 0
    assert total(after, "vllm:kv_cache_usage_perc") == 0
    assert total(after, "qwen3_dist:replicas_healthy") >= 1
    imbalance = [
        value for (name, _), value in samples(after).items() if name == "qwen3_dist:expert_imbalance"
    ]
    assert imbalance and all(1 <= value <= 2 for value in imbalance)  # of two ranks


def test_what_runs_shows_while_it_runs(http: httpx.Client, model: str, page: Page) -> None:
    body = {"model": ADAPTER, "prompt": "Once", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as running:
        parts = running.iter_bytes()
        next(parts)
        now = page()
        assert total(now, "vllm:num_requests_running") == 1
        assert 0 < total(now, "vllm:kv_cache_usage_perc") < 1
        assert total(now, "vllm:lora_requests_info", running_lora_adapters=ADAPTER, max_lora="1") > 1.7e9
        assert total(now, "qwen3_dist:http_streams_in_flight") == 1
        assert total(now, "qwen3_dist:sequences_in_flight") == 1
    wait_for(lambda: total(page(), "qwen3_dist:http_streams_in_flight") == 0)


def test_the_gateway_finds_what_it_routes_by(
    client: openai.OpenAI, http: httpx.Client, model: str, page: Page
) -> None:
    load(client, http, model)
    found = samples(page())
    for name, labels in GATEWAY.items():
        have = [set(dict(pairs)) for (sample, pairs) in found if sample == name]
        assert have and all(labels <= each for each in have), name


def test_refusals_and_errors_are_counted(http: httpx.Client, page: Page) -> None:
    before = page()
    http.post("/v1/completions", content=b"{")
    http.get("/nowhere")
    after = page()
    for labels in ({"route": "/v1/completions", "status": "400"}, {"route": "other", "status": "404"}):
        name = "qwen3_dist:http_requests_total"
        had = sum(
            v for (n, pairs), v in samples(before).items() if n == name and pairs >= set(labels.items())
        )
        assert total(after, name, **labels) == had + 1


def test_ray_has_every_series_that_its_dashboard_and_its_policy_query(
    client: openai.OpenAI, http: httpx.Client, model: str, page: Page
) -> None:
    load(client, http, model)
    queries = [*ray_dashboard().values(), ttft_policy(model)]
    wanted = {name for query in queries for name in names_in(query)} | {
        f"ray_vllm_{name}" for name in KUBERAY
    }
    assert len(wanted) > 25

    def told() -> bytes | None:
        now = agent_page()
        return None if wanted - {name for name, _ in samples(now)} else now

    now = wait_for(told, pause_s=METRICS_PERIOD_S)
    found = samples(now)  # a page of thousands, which takes a second to parse
    for name in sorted(name for name in wanted if name.startswith("ray_vllm")):
        labels = [dict(pairs) for (sample, pairs) in found if sample == name]
        assert all({"model_name", "WorkerId", "engine", "replica"} <= set(each) for each in labels), name
    assert total(now, "ray_vllm_num_requests_swapped", model_name=model) == 0
    # The dashboard joins metrics of the engine with Serve's by the worker.
    workers = {dict(pairs)["WorkerId"] for (n, pairs) in found if n == "ray_vllm_prompt_tokens_total"}
    serving = {
        dict(pairs)["WorkerId"]
        for (n, pairs) in found
        if n == "ray_serve_deployment_request_counter_total" and dict(pairs)["deployment"] == REPLICA
    }
    assert workers & serving
    # Counters arrive in full, a moment later.
    name = "generation_tokens_total"
    wait_for(
        lambda: total(agent_page(), f"ray_vllm_{name}") >= total(page(), f"vllm:{name}"),
        pause_s=METRICS_PERIOD_S,
    )


def test_a_replica_that_hangs_is_left_out_and_the_page_comes_all_the_same(
    page: Page, service_config: ServiceConfig
) -> None:
    wait_for(lambda: len(replicas_in(page())) == 1)
    application = service_config.application(service_config.models[0])
    silent = total(page(), "qwen3_dist:replicas_silent_total")
    [replica] = processes_running(f"ServeReplica:{application}:{REPLICA}")
    os.kill(replica, signal.SIGSTOP)
    try:
        without = page()
    finally:
        os.kill(replica, signal.SIGCONT)
    assert total(without, "qwen3_dist:replicas_silent_total") == silent + 1
    assert not replicas_in(without) and total(without, "qwen3_dist:http_requests_total") > 0
    wait_for(lambda: len(replicas_in(page())) == 1)


def test_a_replica_that_died_is_counted_and_its_successor_tells_its_own_metrics(
    http: httpx.Client, page: Page, service_config: ServiceConfig
) -> None:
    wait_for(lambda: len(replicas_in(page())) == 1)
    lost, before = total(page(), "qwen3_dist:replicas_lost_total"), replicas_in(page())
    application = service_config.application(service_config.models[0])
    [replica] = processes_running(f"ServeReplica:{application}:{REPLICA}")
    asked = {"prompt": "hi", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/completions", json=asked) as answer:
        lines = answer.iter_lines()
        next(lines)
        os.kill(replica, signal.SIGKILL)
        wait_for(lambda: total(page(), "qwen3_dist:replicas_lost_total") == lost + 1)
        assert [*filter(None, lines)][-1] == "data: [DONE]"
    wait_for(lambda: len(now := replicas_in(page())) == 1 and now != before)
    assert total(page(), "qwen3_dist:replicas_lost_total") == lost + 1
