"""The ingress: the Serve deployment that speaks HTTP and passes requests to replicas.

A request is sent to a replica once, already parsed. The answer comes back as a pair of HTTP status and bytes, then,
for a stream, one item of serialised events per engine step.
"""

# No `from __future__ import annotations` here: FastAPI evaluates the annotations of the routes.
import asyncio
import functools
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import ExitStack
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.ray_private import deployment_handle
from qwen3_dist.gc_utils import freeze_gc_heap
from serve_app.apis.chat.request import ChatBody, parse_chat
from serve_app.apis.completions import CompletionBody, parse_completion
from serve_app.apis.embeddings import EmbeddingBody, parse_embedding
from serve_app.apis.messages.request import (
    CountTokensBody,
    MessagesBody,
    parse_count_tokens,
    parse_messages,
)
from serve_app.apis.openapi import AnthropicError, route
from serve_app.apis.requests import AnyRequest
from serve_app.apis.rerank import RerankBody, ScoreBody, parse_rerank, parse_score
from serve_app.apis.responses.not_stored import NotStoredError
from serve_app.apis.responses.recorder import ResponseRecorder
from serve_app.apis.responses.request import ResponsesBody
from serve_app.apis.responses.shared_store import SharedStore
from serve_app.apis.shared.generation import GenerationRequest, with_identity
from serve_app.apis.tokens import (
    DetokenizeBody,
    TokenizeBody,
    parse_detokenize,
    parse_tokenize,
)
from serve_app.ingress.access.control import Access, key_name
from serve_app.ingress.access_log import access_record
from serve_app.ingress.adapter_changes import AdapterChanges
from serve_app.ingress.admission import MAX_IN_FLIGHT_HEADER, Admission, queue_headers
from serve_app.ingress.api import api
from serve_app.ingress.cluster_routes import METRICS, ClusterRoutes
from serve_app.ingress.draining import Draining
from serve_app.ingress.http import (
    json_response,
    read_body,
    route_path,
)
from serve_app.ingress.keep_alive import KeepAliveStream, headers_after_s
from serve_app.ingress.live_changes import LiveChanges
from serve_app.ingress.metrics import IngressMetrics, read_routes
from serve_app.ingress.model_routes import ModelRoutes
from serve_app.ingress.peers import Peers, Told
from serve_app.ingress.reload import Reload
from serve_app.ingress.sending import CHUNK_BYTES, EventStream, LargeResponse
from serve_app.ingress.shared_responses import SharedResponses
from serve_app.ingress.weight_changes import WeightChanges
from serve_app.metrics.definitions import SEQUENCES_IN_FLIGHT, SEQUENCES_LIMIT
from serve_app.metrics.values import Snapshot, Values
from serve_app.settings import REPLICA, IngressConfig, IngressSettings, ServedModel
from serve_app.telemetry.logs import configure_logs
from serve_app.telemetry.traces import trace_to

Items = AsyncGenerator[Any, None]  # a pair of HTTP status and bytes, then bytes
_LARGE_BODY = 2**16  # bytes; larger bodies are parsed in a thread


@serve.ingress(api)
class Ingress(ClusterRoutes):
    """The HTTP endpoint: checks requests, passes them to a replica and streams the answers."""

    def __init__(self, replicas: Mapping[str, DeploymentHandle] | None = None) -> None:
        """`replicas` are those of models in the ingress's own application; others are found by their applications'
        names. Serve calls `reconfigure` next."""
        super().__init__()
        self._own_replicas = dict(replicas or {})
        self._routes = ModelRoutes(self._find_replicas, self._num_ingresses)
        self._settings = IngressSettings()
        self._admission = Admission(self._max_in_flight, 1, self._num_ingresses)
        self._draining = Draining()
        self._access = Access(self._num_ingresses)
        context = serve.get_replica_context()
        ingress = context.replica_id.unique_id
        self._process = f"{context.deployment}#{ingress}"
        self._peers = Peers(lambda: deployment_handle(context.deployment, context.app_name), ingress)
        self._reload = Reload(self._peers)
        changes = LiveChanges(self._routes, self._peers)
        self._adapters = AdapterChanges(self._routes, changes)
        self._weights = WeightChanges(self._routes, changes)
        self._stored = SharedStore(0, 0.0)
        self._shared = SharedResponses(self._stored, self._peers)
        self.metrics_of_http = IngressMetrics(self._ask_metrics, self._read_state, ingress)
        self._peers.offer("metrics", self.metrics_of_http.read)
        self._peers.offer("state", self._state)
        self._push = self.metrics_of_http.push_to_ray()
        freeze_gc_heap()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Takes up an IngressConfig in its JSON form; requests in flight go on as they began.

        A coroutine, since Serve runs plain functions in threads, where there is no event loop to watch health on.
        """
        config = IngressConfig.from_json(user_config)
        settings = config.settings
        self._access.configure(settings)  # first, since it refuses a keys file that it cannot read
        self._settings = settings
        self._access.watch_keys_file()
        configure_logs(config.telemetry, self._process)
        trace_to(config.telemetry.traces_url, self._process)
        self._routes.configure(config)
        self._admission.max_per_request = max(model.max_ongoing_requests for model in config.models)
        self._stored.limit(int(settings.stored_responses_mib * 2**20), settings.stored_responses_s)
        self._shared.copy_once()

    def _find_replicas(self, model: ServedModel) -> DeploymentHandle:
        if model.application:
            return deployment_handle(REPLICA, model.application)
        return self._own_replicas[model.name]

    def check_request(self, request: Request) -> Response | None:
        """Returns the response to a browser's preflight request, None for others. Called before the body is read.

        Raises RequestError if the key is missing or wrong (401, 403), if the key or the service is at a limit (429),
        or if the service is shutting down (503).
        """
        if route_path(request) != METRICS:  # which tells how the service drains
            self._draining.check()
        try:
            answer = self._access.check(request)
        finally:
            access_record(request.scope).key_name = key_name(request)
        if answer is None and request.method == "POST" and not self._access.is_admins(request):
            self._admission.check()
            self._access.check_limits(request)
        return answer

    async def _ask_metrics(self, timeout_s: float) -> list[Snapshot | BaseException]:
        """The metrics of the other ingresses and of the replicas of all models, or why one does not tell them."""
        others, *of_models = await asyncio.gather(
            self._peers.ask("metrics", timeout_s=timeout_s),
            *(each.ask_each("metrics", timeout_s) for each in self._routes),
        )
        told = [each.value if isinstance(each, Told) else each for each in others]
        return told + [answer for of_model in of_models for answer in of_model]

    async def answer_peer(self, asker: str, only: str, name: str, arguments: tuple[Any, ...]) -> Told | None:
        """Answers a call of another ingress."""
        return self._peers.answer(asker, only, name, arguments)

    def _read_state(self, values: Values) -> None:
        read_routes(values, self._routes)
        values.set(SEQUENCES_IN_FLIGHT, self._admission.in_flight)
        values.set(SEQUENCES_LIMIT, self._admission.share())

    @api.post_directly("/v1/chat/completions", **route("OpenAI: chat", ChatBody, streams=True))
    async def chat_completions(self, request: Request) -> Response:
        return await self._forward(request, parse_chat)

    @api.post_directly(
        "/v1/completions", **route("OpenAI: completions of text", CompletionBody, streams=True)
    )
    async def completions(self, request: Request) -> Response:
        return await self._forward(request, parse_completion)

    @api.post_directly("/v1/responses", **route("OpenAI: responses", ResponsesBody, streams=True))
    async def responses(self, request: Request) -> Response:
        recorder = ResponseRecorder(self._stored, self._shared.hand_over)
        return await self._forward(request, recorder.parse, recorder.record)

    @api.get("/v1/responses/{response_id}", **route("OpenAI: a stored response"))
    async def response(self, response_id: str) -> Response:
        return json_response(await self._shared.response(response_id))

    @api.delete("/v1/responses/{response_id}", **route("OpenAI: forgets a stored response"))
    async def delete_response(self, response_id: str) -> Response:
        await self._shared.delete(response_id)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    @api.post_directly(
        "/v1/messages", **route("Anthropic: messages", MessagesBody, streams=True, error=AnthropicError)
    )
    async def messages(self, request: Request) -> Response:
        return await self._forward(request, parse_messages)

    @api.post(
        "/v1/messages/count_tokens",
        **route("Anthropic: the tokens of a prompt", CountTokensBody, error=AnthropicError),
    )
    async def count_tokens(self, request: Request) -> Response:
        return await self._forward(request, parse_count_tokens)

    @api.post_directly("/v1/embeddings", **route("OpenAI: embeddings of texts", EmbeddingBody))
    async def embeddings(self, request: Request) -> Response:
        return await self._forward(request, parse_embedding)

    @api.post("/v1/rerank", **route("Cohere and Jina: documents in the order of their relevance", RerankBody))
    async def rerank(self, request: Request) -> Response:
        return await self._forward(request, parse_rerank)

    @api.post("/v1/score", **route("vLLM: the relevance of texts to others", ScoreBody))
    async def score(self, request: Request) -> Response:
        return await self._forward(request, parse_score)

    @api.post("/tokenize", **route("vLLM: text or messages to token ids", TokenizeBody))
    async def tokenize(self, request: Request) -> Response:
        return await self._forward(request, parse_tokenize)

    @api.post("/detokenize", **route("vLLM: token ids to text", DetokenizeBody))
    async def detokenize(self, request: Request) -> Response:
        return await self._forward(request, parse_detokenize)

    async def drain(self, timeout_s: float) -> int:
        """Refuses new requests and ends running ones after `timeout_s` seconds. Returns the number of running
        sequences."""
        self._draining.begin(timeout_s)
        return self._admission.in_flight

    async def _forward(
        self,
        http_request: Request,
        parse: Callable[[bytes], AnyRequest],
        observe: Callable[[Items], Items] = lambda items: items,
    ) -> Response:
        """Has a replica answer the request that `parse` reads from the body. `observe` wraps the answer's items."""
        with ExitStack() as resources:
            resources.enter_context(self._access.running(http_request))
            admitted = resources.enter_context(self._admission.admit())
            settings = self._settings
            body = await read_body(
                http_request, int(settings.max_request_mib * 2**20), settings.body_timeout_s
            )
            request = await self._parse(parse, body)
            request = self._access.with_terms(http_request, request)
            if isinstance(request, GenerationRequest):
                request = with_identity(request, access_record(http_request.scope).request_id)
            model = self._routes.find(request.model)
            model.require_awake()
            if isinstance(request, GenerationRequest):
                model.queue(len(body))
            admitted.count(request.num_sequences)
            resources.enter_context(model.admission.admit()).count(request.num_sequences)
            record = access_record(http_request.scope)
            record.model = request.model or model.model.name
            trace = (record.span.carrier,) if record.span else ()
            charge = functools.partial(self._access.charge, http_request)
            answer = model.dispatcher.answer(
                request,
                record.request_id,
                *trace,
                charge=charge,
                on_count=record.count,
                on_end=record.end_with,
                on_resume=record.resume,
            )
            stream = request if isinstance(request, GenerationRequest) and request.stream else None
            items = KeepAliveStream(self._draining.watch(observe(answer)), stream.ping if stream else b"")
            try:
                opening = await items.first(headers_after_s(settings.queue_timeout_s) if stream else None)
            except BaseException:
                await items.aclose()
                raise
            status, first = opening or (HTTPStatus.OK, stream.ping if stream else b"")
            timeout_s = settings.write_timeout_s
            if stream and status == HTTPStatus.OK:
                return self._with_limit(
                    EventStream(first, items, stream.error_events, timeout_s, resources.pop_all())
                )
            await items.aclose()
        if len(first) > CHUNK_BYTES:
            return self._with_limit(LargeResponse(first, status, timeout_s))
        late = status == HTTPStatus.TOO_MANY_REQUESTS  # it has waited too long in an engine's queue
        headers = queue_headers(model.admission.retry_after_s()) if late else None
        return self._with_limit(json_response(first, status, headers))

    async def _parse(self, parse: Callable[[bytes], AnyRequest], body: bytes) -> AnyRequest:
        """Parses a body, with the stored responses of other ingresses as far as it refers to them."""
        asked: set[str] = set()
        while True:
            try:
                return parse(body) if len(body) < _LARGE_BODY else await asyncio.to_thread(parse, body)
            except NotStoredError as missing:
                if missing.response_id in asked or not await self._shared.find(missing.response_id):
                    raise
                asked.add(missing.response_id)

    def _with_limit(self, response: Response) -> Response:
        """Adds the header that tells Serve's proxies how many requests may be in flight in the whole service."""
        response.headers[MAX_IN_FLIGHT_HEADER] = str(self._max_in_flight())
        return response
