"""OpenTelemetry: a span for each HTTP request, and below it those of the replica: queue, prefill, decode.

OpenTelemetry is imported only by `trace_to`. Attributes follow its semantic conventions of HTTP and of generative AI.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from starlette.types import Scope

from qwen3_dist import __version__
from qwen3_dist.errors import ConfigError
from serve_app.telemetry.summary import RequestSummary

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

logger = logging.getLogger("qwen3_dist.traces")
_NANOSECONDS = 1_000_000_000
_PROVIDER = "qwen3_dist"
_NEEDED = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
_FLUSH_MS = 2000


class _State:
    """Where this process sends its spans; nowhere while `tracer` is None."""

    provider: TracerProvider | None = None
    tracer: Tracer | None = None
    url: str = ""


_state = _State()


def check_extra(url: str) -> None:
    """Raises ConfigError if traces are asked for and OpenTelemetry is not installed."""
    if url and not all(map(_is_installed, _NEEDED)):
        raise ConfigError(
            "otlp_traces_endpoint needs OpenTelemetry, which is not installed; install it on all nodes with pip "
            "install 'qwen3-dist[otel]', or leave the setting out"
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it
        return False


def trace_to(url: str, process: str, exporter: SpanExporter | None = None) -> None:
    """Sends spans of this process to `url` from now on, or to `exporter` at once; nowhere if `url` is empty.

    Spans that were recorded before go where they went. Raises ConfigError without the extra otel.
    """
    if url == _state.url and exporter is None:
        return
    if _state.provider is not None:
        threading.Thread(target=_state.provider.shutdown, daemon=True).start()  # sends what it still has
    _state.provider = _state.tracer = None
    _state.url = url
    if not url and exporter is None:
        return
    if exporter is None:
        check_extra(url)
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

    resource = Resource.create(
        {"service.name": _PROVIDER, "service.version": __version__, "service.instance.id": process}
    )
    provider = TracerProvider(resource=resource)
    if exporter is not None:
        provider.add_span_processor(SimpleSpanProcessor(exporter))
    else:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    _state.provider, _state.tracer = provider, provider.get_tracer(_PROVIDER, __version__)


def flush_traces() -> None:
    """Sends what is waiting to be sent; waits at most two seconds."""
    if _state.provider is not None:
        _state.provider.force_flush(_FLUSH_MS)


class ServerSpan:
    """The span of an HTTP request on the ingress, from its arrival until `end`."""

    def __init__(self, tracer: Tracer, method: str, path: str, scope: Scope) -> None:
        from opentelemetry.trace import SpanKind

        headers = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in (b"traceparent", b"tracestate")
        }
        self._span: Span = tracer.start_span(
            f"{method} {path}",
            context=_context_of(headers),
            kind=SpanKind.SERVER,
            attributes={
                "http.request.method": method,
                "url.path": path,
                "url.scheme": scope.get("scheme", "http"),
            },
        )

    @property
    def carrier(self) -> dict[str, str]:
        """The headers `traceparent` and `tracestate` that make this span the parent of others."""
        from opentelemetry.trace import set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        headers: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(headers, set_span_in_context(self._span))
        return headers

    def end(self, status: int, request_id: str, scope: Scope) -> None:
        """Ends the span of a request that was answered with `status`."""
        from opentelemetry.trace import StatusCode

        span = self._span
        method = scope.get("method", "")
        route = getattr(scope.get("route"), "path", None)
        span.update_name(f"{method} {route}" if route else method)
        if route:
            span.set_attribute("http.route", route)
        span.set_attribute("http.response.status_code", status)
        span.set_attribute("qwen3_dist.request_id", request_id)
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            span.set_attribute("error.type", str(status))
            span.set_status(StatusCode.ERROR)
        span.end()


def server_span(method: str, path: str, scope: Scope) -> ServerSpan | None:
    """Begins the span of an HTTP request; None if this process sends no traces."""
    return None if _state.tracer is None else ServerSpan(_state.tracer, method, path, scope)


def record_request(
    operation: str,
    request_id: str,
    parent: Mapping[str, str],
    summary: RequestSummary,
    parameters: Mapping[str, Any],
) -> None:
    """Records the spans of a request that ended now on a replica: the operation, and below it `queue`, `prefill`
    and `decode`, as far as it came. `parent` is the `carrier` of the ingress's span.

    `operation` is the semantic conventions' gen_ai.operation.name, `parameters` those of the request by the last part
    of their attributes' names; None is left out.
    """
    tracer = _state.tracer
    if tracer is None:
        return
    from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

    began = time.time_ns() - int(summary.ended_s * _NANOSECONDS)

    def at(seconds: float) -> int:
        return began + int(seconds * _NANOSECONDS)

    attributes = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": _PROVIDER,
        "gen_ai.request.model": summary.model,
        "gen_ai.response.model": summary.model,
        "gen_ai.usage.input_tokens": summary.prompt_tokens,
        "gen_ai.usage.output_tokens": summary.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": summary.cached_tokens,
        "gen_ai.response.finish_reasons": summary.finish_reasons,
        "gen_ai.response.time_to_first_chunk": summary.first_token_s,
        "qwen3_dist.request_id": request_id,
        **{f"gen_ai.request.{name}": value for name, value in parameters.items()},
    }
    whole = tracer.start_span(
        f"{operation} {summary.model}".rstrip(),
        context=_context_of(parent),
        kind=SpanKind.INTERNAL,  # the model runs in this service
        attributes={name: _attribute(value) for name, value in attributes.items() if value is not None},
        start_time=began,
    )
    inside = set_span_in_context(whole)
    stages = (
        ("queue", summary.queued_s, summary.scheduled_s),
        ("prefill", summary.scheduled_s, summary.first_token_s),
        ("decode", summary.first_token_s, summary.last_token_s),
    )
    for name, start_s, end_s in stages:
        if start_s is not None:
            part = tracer.start_span(name, context=inside, start_time=at(start_s))
            part.end(at(max(start_s, summary.ended_s if end_s is None else end_s)))
    if "error" in summary.finish_reasons:
        whole.set_attribute("error.type", "error")
        whole.set_status(StatusCode.ERROR)
    whole.end(at(summary.ended_s))


def _attribute(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _context_of(headers: Mapping[str, str]) -> Context:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract(headers)
