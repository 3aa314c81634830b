"""What is recorded of requests and how it is told to Prometheus and to Ray. No Ray, no HTTP server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from fastapi import Request
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.engine.rank_pace import RankPace
from qwen3_dist.errors import RequestError
from qwen3_dist.layout import Layout
from qwen3_dist.protocol.outputs import TokenDelta
from qwen3_dist.settings import EngineConfig
from qwen3_dist.text.choice import ChoiceDelta
from serve_app.apis.completions import parse_completion
from serve_app.ingress.access.limits import KeyLimitError
from serve_app.ingress.admission import OverloadedError
from serve_app.ingress.http import Meter, make_api
from serve_app.ingress.metrics import IngressMetrics
from serve_app.metrics import definitions as names
from serve_app.metrics import ray_export
from serve_app.metrics.definitions import DEFINITIONS
from serve_app.metrics.engine import EngineMetrics
from serve_app.metrics.exposition import render
from serve_app.metrics.ray_export import MOST_OBSERVATIONS, RayExport, middles, sampled
from serve_app.metrics.requests import RequestMetrics
from serve_app.metrics.values import Histogram, HistogramCounts, Snapshot, Values
from serve_app.replica.request_handler import RequestHandler

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(page: bytes) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    }


def total(page: bytes, name: str, **labels: str) -> float:
    """The sum of a metric's samples that have these labels. Fails if there are none."""
    found = [v for (n, have), v in samples(page).items() if n == name and have >= set(labels.items())]
    assert found, f"{name} {labels} is missing"
    return sum(found)


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncEngine]:
    engine = AsyncEngine(EngineConfig(device="cpu", dtype="float32", kv_cache_dtype="fp8", num_blocks=256))
    yield engine
    engine.shutdown()


@pytest.fixture
def metrics(engine: AsyncEngine) -> EngineMetrics:
    return EngineMetrics(engine, "m", "r1")


@pytest.fixture
def handler(engine: AsyncEngine, metrics: EngineMetrics) -> RequestHandler:
    return RequestHandler(engine, "m", {}, metrics=metrics.requests)


def completion(**fields: Any) -> Any:
    body = {"model": "m", "prompt": [5, 6, 7], "temperature": 0, "ignore_eos": True, **fields}
    return parse_completion(json.dumps(body).encode())


def page_of(metrics: EngineMetrics) -> bytes:
    return render([asyncio.run(metrics.read())])


def test_a_request_is_counted_by_how_it_ends_and_observed_in_each_histogram(
    handler: RequestHandler, metrics: EngineMetrics, engine: AsyncEngine
) -> None:
    before = engine.stats().generation_tokens
    asyncio.run(handler.respond(completion(max_tokens=5, n=2)))
    page = page_of(metrics)
    assert total(page, "vllm:cache_config_info", cache_dtype="fp8", num_gpu_blocks="256") == 1
    assert total(page, "vllm:request_success_total", finished_reason="length", model_name="m") == 2
    assert total(page, "vllm:request_success_total") == 2
    assert engine.stats().generation_tokens - before == 10
    for name, count in (
        ("time_to_first_token_seconds", 2),
        ("inter_token_latency_seconds", 8),
        ("time_per_output_token_seconds", 8),
        ("request_time_per_output_token_seconds", 2),
        ("e2e_request_latency_seconds", 2),
        ("request_queue_time_seconds", 2),
        ("request_prefill_time_seconds", 2),
        ("request_decode_time_seconds", 2),
        ("request_inference_time_seconds", 2),
    ):
        assert total(page, f"vllm:{name}_count") == count, name
        assert total(page, f"vllm:{name}_bucket", le="+Inf") == count, name
        assert 0 < total(page, f"vllm:{name}_sum") < 100, name
    assert total(page, "vllm:request_prompt_tokens_sum") == 6
    assert total(page, "vllm:request_generation_tokens_sum") == 10
    inside = total(page, "vllm:request_inference_time_seconds_sum")
    assert inside == pytest.approx(
        total(page, "vllm:request_prefill_time_seconds_sum")
        + total(page, "vllm:request_decode_time_seconds_sum")
    )


def test_a_stop_string_counts_as_stop_although_the_engine_was_told_to_abort(
    handler: RequestHandler, metrics: EngineMetrics
) -> None:
    text = json.loads(asyncio.run(handler.respond(completion(max_tokens=12))))["choices"][0]["text"]
    asyncio.run(handler.respond(completion(max_tokens=12, stop=text[3:6])))
    page = page_of(metrics)
    assert total(page, "vllm:request_success_total", finished_reason="length") == 1
    assert total(page, "vllm:request_success_total", finished_reason="stop") == 1


def test_ranks_own_time_is_a_counter_by_rank(
    metrics: EngineMetrics, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def pace() -> RankPace:
        return RankPace((0.1, 0.2), (1.5, 3.0))

    assert b"rank_own_seconds" not in page_of(metrics)  # one rank waits for none
    monkeypatch.setattr(engine._engine, "config", replace(engine.config, layout=Layout(tp=2)))
    monkeypatch.setattr(engine, "rank_pace", pace)
    page = page_of(metrics)
    assert [total(page, "qwen3_dist:rank_own_seconds_total", rank=rank) for rank in "01"] == [1.5, 3.0]


def test_a_client_that_leaves_counts_as_abort(handler: RequestHandler, metrics: EngineMetrics) -> None:
    async def leave() -> None:
        stream: AsyncGenerator[bytes, None] = handler.stream(completion(max_tokens=400, stream=True))
        async with aclosing(stream):
            await anext(stream)  # it is accepted
            await anext(stream)

    asyncio.run(leave())
    page = page_of(metrics)
    assert total(page, "vllm:request_success_total", finished_reason="abort") == 1
    assert total(page, "vllm:time_to_first_token_seconds_count") == 1
    assert total(page, "vllm:e2e_request_latency_seconds_count") == 0  # it says how long whole answers take


def test_a_request_that_is_refused_is_not_counted(handler: RequestHandler, metrics: EngineMetrics) -> None:
    with pytest.raises(RequestError):
        asyncio.run(handler.respond(completion(prompt=[10**6])))
    assert total(page_of(metrics), "vllm:request_success_total") == 0


def test_a_step_that_adds_several_tokens_spreads_its_time_over_them() -> None:
    histogram = Histogram((0.1, 0.2))
    histogram.observe(0.15, times=3)
    histogram.observe(0.2)
    histogram.observe(7.0)
    assert histogram.read() == ((0, 4, 1), pytest.approx(7.65))


def test_tokens_of_one_step_share_its_time_and_those_after_the_end_do_not_count() -> None:
    metrics = RequestMetrics()
    arrival_s = time.monotonic()
    with metrics.watch(arrival_s, prompt_tokens=3, n=1) as watch:
        watch.generated([TokenDelta(0, (5,), scheduled_s=arrival_s + 1, step_s=arrival_s + 2)])
        watch.generated([TokenDelta(0, (5, 5, 5), step_s=arrival_s + 5)])
        watch.shown([ChoiceDelta(0, "", (5,), (), "tool_calls")])
        watch.generated([TokenDelta(0, (5,), step_s=arrival_s + 6)])
    told = metrics.values.snapshot({}).values

    def histogram(name: str) -> tuple[int, float]:
        value = told[name][()]
        assert isinstance(value, HistogramCounts)
        return sum(value.counts), value.sum

    assert histogram("inter_token_latency_seconds") == (3, pytest.approx(3.0))
    assert histogram("request_generation_tokens") == (1, 4)
    assert histogram("request_prefill_time_seconds") == (1, pytest.approx(1.0))
    assert histogram("request_decode_time_seconds") == (1, pytest.approx(3.0))
    assert histogram("request_time_per_output_token_seconds") == (1, pytest.approx(1.0))
    assert told["request_success"] == {("stop",): 1, ("length",): 0, ("abort",): 0, ("error",): 0}


def snapshot(replica: str, running: float) -> Snapshot:
    values = Values()
    values.set(names.NUM_RUNNING, running)
    values.histogram(names.E2E_LATENCY).observe(1.0)
    return values.snapshot({"model_name": "m", "replica": replica})


def test_replicas_share_a_page_with_each_family_once_and_keep_their_labels() -> None:
    ingress = Values()
    ingress.set(names.REPLICAS_HEALTHY, 2)
    page = render([ingress.snapshot({"ingress": "i"}), snapshot("a", 1), snapshot("b", 2)])
    assert page.count(b"# TYPE vllm:num_requests_running gauge") == 1
    assert total(page, "vllm:num_requests_running", replica="b", model_name="m") == 2
    assert total(page, "qwen3_dist:replicas_healthy", ingress="i") == 2
    assert total(page, "vllm:e2e_request_latency_seconds_bucket", le="1.0", replica="a") == 1
    assert total(page, "vllm:e2e_request_latency_seconds_bucket", le="0.8", replica="a") == 0


def test_another_prefix_renames_what_vllm_has_and_nothing_else() -> None:
    values = Values()
    values.set(names.STEPS, 1)
    values.set(names.KV_USAGE, 0.5)
    page = render([values.snapshot({}, "mine")])
    assert b"vllm" not in page
    assert total(page, "mine:kv_cache_usage_perc") == total(page, "mine:gpu_cache_usage_perc") == 0.5
    assert total(page, "qwen3_dist:steps_total") == 1


def test_models_of_one_page_may_have_prefixes_of_their_own() -> None:
    values = Values()
    values.set(names.NUM_RUNNING, 5)
    page = render([snapshot("a", 1), values.snapshot({"model_name": "n"}, "mine")])
    assert total(page, "mine:num_requests_running", model_name="n") == 5
    assert total(page, "vllm:num_requests_running") == 1


def test_names_are_unique_and_each_metric_is_explained() -> None:
    everything = [name for each in DEFINITIONS for name in (each.name, *each.aliases)]
    assert len(set(everything)) == len(everything)
    for each in DEFINITIONS:
        assert each.help.endswith("."), each.name
        assert (each.kind == "histogram") == bool(each.buckets), each.name
        assert list(each.buckets) == sorted(set(each.buckets)), each.name


class FakeRay:
    """Stands for `ray.util.metrics`: remembers what it is given."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, float]] = []

    def __getattr__(self, kind: str) -> Any:
        def make(name: str, help: str, *others: Any) -> Any:
            def take(value: float, tags: Mapping[str, str]) -> None:
                assert all(isinstance(tag, str) for tag in tags.values())
                self.calls.append((kind, name, value))

            return type(
                kind,
                (),
                {"inc": staticmethod(take), "set": staticmethod(take), "observe": staticmethod(take)},
            )

        return make


def test_ray_gets_what_changed_since_the_last_push(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay()
    monkeypatch.setattr(ray_export, "ray_metrics", ray)
    values, export = Values(), RayExport()
    values.set(names.PROMPT_TOKENS, 7)
    values.add(names.REQUEST_SUCCESS, 0, "stop")
    values.histogram(names.E2E_LATENCY).observe(0.4, times=2)
    export.push(values.snapshot({"replica": "r"}))
    assert ray.calls == [
        ("Counter", "vllm_prompt_tokens", 7),
        ("Histogram", "vllm_e2e_request_latency_seconds", 0.4),
        ("Histogram", "vllm_e2e_request_latency_seconds", 0.4),
    ]
    ray.calls.clear()
    export.push(values.snapshot({"replica": "r"}))
    assert not ray.calls
    values.set(names.PROMPT_TOKENS, 9)
    export.push(values.snapshot({"replica": "r"}))
    assert ray.calls == [("Counter", "vllm_prompt_tokens", 2)]


def test_of_very_many_observations_ray_gets_a_sample_in_proportion() -> None:
    assert sampled([0, 3, 1], MOST_OBSERVATIONS) == [0, 3, 1]
    few = sampled([90_000, 10_000, 1], MOST_OBSERVATIONS)
    assert few == [pytest.approx(270, abs=1), pytest.approx(30, abs=1), 1]


def test_a_bucket_is_told_to_ray_by_a_value_inside_it() -> None:
    bounds = (0.1, 0.3, 1.0)
    counted = Histogram(bounds)
    for value in middles(bounds):
        counted.observe(value)
    assert counted.read().counts == (1, 1, 1, 1)


def ingress_metrics(answers: Sequence[Snapshot | BaseException]) -> IngressMetrics:
    async def ask(timeout_s: float) -> Sequence[Snapshot | BaseException]:
        return answers

    return IngressMetrics(ask, lambda values: None, "i")


def test_a_replica_that_does_not_answer_is_left_out_and_counted() -> None:
    metrics = ingress_metrics([snapshot("a", 1), TimeoutError()])
    page = asyncio.run(metrics.page())
    assert total(page, "vllm:num_requests_running") == 1
    assert total(page, "qwen3_dist:replicas_silent_total") == 1
    page = asyncio.run(metrics.page())
    assert total(page, "qwen3_dist:replicas_silent_total") == 2


def test_requests_are_counted_by_route_method_and_status() -> None:
    metrics = ingress_metrics([])

    def gate(request: Request) -> None:
        if "key" in request.query_params:
            raise RequestError("no key", status=401)
        if "full" in request.query_params:
            raise OverloadedError(limit=1, retry_after_s=1)
        if "limit" in request.query_params:
            raise KeyLimitError("too much", 1)

    def meter_of(request: Request) -> Meter:
        return metrics.request

    api = make_api(gate, meter_of)
    api.add_api_route("/things/{name}", lambda name: {"name": name}, methods=["GET"])
    api.add_api_route("/plain", lambda: {}, methods=["GET"])
    client = TestClient(api, raise_server_exceptions=False)
    for path in (
        "/things/a",
        "/things/b",
        "/plain",
        "/nowhere/1",
        "/nowhere/2",
        "/plain?key",
        "/things/c?key",
        "/plain?full",
        "/plain?limit",
    ):
        client.get(path)
    client.request("SPY", "/plain")
    page = asyncio.run(metrics.page())
    requests = "qwen3_dist:http_requests_total"
    assert total(page, requests, route="/things/{name}", method="GET", status="200") == 2
    assert total(page, requests, route="/plain", method="GET", status="200") == 1
    assert total(page, requests, route="/plain", method="GET", status="401") == 1
    assert total(page, requests, route="other", status="404") == 2
    assert total(page, requests, route="/plain", method="other", status="405") == 1
    assert total(page, requests, route="other", status="401") == 1
    assert total(page, "qwen3_dist:http_refused_total", reason="key") == 2
    for reason in ("overloaded", "key_limit"):
        assert total(page, "qwen3_dist:http_refused_total", reason=reason) == 1
    assert total(page, "qwen3_dist:http_requests_in_flight") == 0
