"""Spans of a request: the ingress's, and below it the replica's, in one trace that the client began."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import httpx
import pytest
from fastapi import Request, Response

from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.errors import ConfigError
from qwen3_dist.settings import EngineConfig
from serve_app.apis.chat.request import parse_chat
from serve_app.apis.completions import parse_completion
from serve_app.apis.embeddings import parse_embedding
from serve_app.apis.shared.answer import Counted
from serve_app.ingress.access_log import access_record
from serve_app.ingress.http import make_api
from serve_app.replica.request_handler import RequestHandler
from serve_app.settings import TelemetrySettings
from serve_app.telemetry import traces
from serve_app.telemetry.summary import RequestSummary
from tests.serve_app.collector import Collector, running_collector
from tests.serve_app.resuming import Replica

memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


@pytest.fixture
def exporter() -> Iterator[Any]:
    exporter = memory.InMemorySpanExporter()
    traces.trace_to("", "test", exporter)
    yield exporter
    traces._state.provider = traces._state.tracer = None


@pytest.fixture
def collector() -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    with running_collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncEngine]:
    engine = AsyncEngine(EngineConfig(device="cpu", dtype="float32", num_blocks=256))
    yield engine
    engine.shutdown()


def answer(engine: AsyncEngine, request: Any, most: int | None = None) -> None:
    """Has a replica answer `request`. The client of a stream leaves after `most` parts."""
    replica = Replica.__new__(Replica)
    replica._engine, replica._handler = engine, RequestHandler(engine, "m", {})
    replica._num_answering, replica._name = 0, "r1"

    async def take() -> None:
        num_parts = 0
        async with aclosing(replica.answer(request, "id-1", {"traceparent": TRACEPARENT})) as items:
            async for item in items:
                num_parts += isinstance(item, Counted) and isinstance(item.item, bytes)
                if num_parts == most:
                    return

    asyncio.run(take())


def spans(exporter: Any) -> dict[str, Any]:
    return {span.name: span for span in exporter.get_finished_spans()}


@pytest.mark.parametrize("stream", [False, True])
def test_a_replica_records_queue_prefill_and_decode_below_the_operation(
    engine: AsyncEngine, exporter: Any, stream: bool
) -> None:
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 5,
        "ignore_eos": True,
        "top_p": 0.5,
    }
    answer(engine, parse_chat(json.dumps({**body, "stream": stream}).encode()))
    found = spans(exporter)
    assert set(found) == {"chat m", "queue", "prefill", "decode"}
    whole = found["chat m"]
    assert f"{whole.context.trace_id:032x}" == TRACE and f"{whole.parent.span_id:016x}" == PARENT
    parts = [found[name] for name in ("queue", "prefill", "decode")]
    assert all(part.parent.span_id == whole.context.span_id for part in parts)
    times = [whole.start_time, *(part.start_time for part in parts), parts[-1].end_time, whole.end_time]
    assert times == sorted(times)
    for before, after in zip(parts, parts[1:], strict=False):
        assert before.end_time == after.start_time
    told = dict(whole.attributes)
    assert told["gen_ai.usage.input_tokens"] > 0 and told["gen_ai.response.time_to_first_chunk"] > 0
    assert (
        told
        | {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "qwen3_dist",
            "gen_ai.request.model": "m",
            "gen_ai.response.model": "m",
            "gen_ai.request.max_tokens": 5,
            "gen_ai.request.top_p": 0.5,
            "gen_ai.request.stream": stream,
            "gen_ai.usage.output_tokens": 5,
            "gen_ai.response.finish_reasons": ("length",),
            "qwen3_dist.request_id": "id-1",
        }
        == told
    )


def test_attributes_are_those_of_the_semantic_conventions(engine: AsyncEngine, exporter: Any) -> None:
    names = pytest.importorskip("opentelemetry.semconv._incubating.attributes.gen_ai_attributes")
    known = {value for name, value in vars(names).items() if name.startswith("GEN_AI_")}
    answer(engine, parse_completion(b'{"prompt": [5], "max_tokens": 2, "n": 2, "seed": 1, "top_k": 3}'))
    used = [name for span in exporter.get_finished_spans() for name in span.attributes]
    assert {name for name in used if name.startswith("gen_ai.")} <= known
    assert "gen_ai.request.choice.count" in used and "gen_ai.request.top_k" in used


def test_an_embedding_has_its_operation_alone(engine: AsyncEngine, exporter: Any) -> None:
    answer(engine, parse_embedding(b'{"input": [5, 6, 7]}'))
    [span] = exporter.get_finished_spans()
    assert (span.name, span.attributes["gen_ai.usage.input_tokens"]) == ("embeddings m", 3)


def test_an_abort_and_a_failure_are_recorded(engine: AsyncEngine, exporter: Any) -> None:
    endless = b'{"prompt": [5], "max_tokens": 200, "ignore_eos": true, "stream": true}'
    answer(engine, parse_completion(endless), most=2)
    whole = spans(exporter)["text_completion m"]
    assert whole.attributes["gen_ai.response.finish_reasons"] == ("abort",)
    exporter.clear()
    answer(engine, parse_completion(b'{"prompt": [5], "max_tokens": 5, "model": "other"}'))
    failed = spans(exporter)["text_completion other"]
    assert not failed.status.is_ok and failed.attributes["error.type"] == "error"


def test_the_ingress_continues_the_clients_trace_and_hands_it_on(exporter: Any) -> None:
    api = make_api(lambda request: None)
    carried: list[dict[str, str]] = []

    @api.post("/items/{name}")
    async def item(name: str, request: Request) -> Response:
        span = access_record(request.scope).span
        assert span is not None
        carried.append(span.carrier)
        return Response(status_code=503)

    @api.get("/health")
    async def health() -> Response:
        return Response()

    async def ask() -> None:
        transport = httpx.ASGITransport(api)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await client.post("/items/a", headers={"traceparent": TRACEPARENT, "x-request-id": "id-2"})
            await client.get("/health")

    asyncio.run(ask())
    [span] = exporter.get_finished_spans()
    assert span.name == "POST /items/{name}" and span.kind.name == "SERVER"
    assert f"{span.parent.span_id:016x}" == PARENT
    assert carried == [{"traceparent": f"00-{TRACE}-{span.context.span_id:016x}-01"}]
    assert span.attributes["http.response.status_code"] == 503 and not span.status.is_ok
    assert span.attributes["qwen3_dist.request_id"] == "id-2"


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "_NEEDED", ("opentelemetry.missing.thing",))
    with pytest.raises(ConfigError, match=r"pip install 'qwen3-dist\[otel\]'"):
        traces.trace_to("http://collector:4318/v1/traces", "test")
    traces.check_extra("")


def test_a_collectors_url_is_http_and_gets_otlps_path() -> None:
    assert TelemetrySettings(otlp_traces_endpoint="http://c:4318").traces_url == "http://c:4318/v1/traces"
    assert TelemetrySettings(otlp_traces_endpoint="https://c/x").traces_url == "https://c/x"
    assert TelemetrySettings().traces_url == ""
    for bad in ("grpc://c:4317", "c:4317", "http://"):
        with pytest.raises(ConfigError, match="OTLP over HTTP"):
            TelemetrySettings(otlp_traces_endpoint=bad)


def test_spans_reach_a_collector_by_otlp(collector: Collector) -> None:
    traces.trace_to(collector.url, "Ingress#1")
    try:
        traces.record_request("chat", "id-3", {"traceparent": TRACEPARENT}, RequestSummary(model="m"), {})
        traces.flush_traces()
    finally:
        traces.trace_to("", "Ingress#1")
    [(span, resource)] = collector.spans()
    assert (span.name, span.trace_id.hex()) == ("chat m", TRACE)
    assert resource["service.name"] == "qwen3_dist" and resource["service.instance.id"] == "Ingress#1"
