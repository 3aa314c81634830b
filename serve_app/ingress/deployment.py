"""The ingress: the Serve deployment that speaks HTTP and passes requests to replicas.

A request is sent to a replica once, already parsed. The answer comes back as a pair of HTTP status and bytes, then,
for a stream, one item of serialised events per engine step.
"""

# No `from __future__ import annotations` here: FastAPI evaluates the annotations of the routes.
import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import ExitStack
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from ray import serve
from ray.serve.handle import DeploymentHandle

from qwen3_dist import __version__
from qwen3_dist.errors import EngineDeadError
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
from serve_app.apis.models import Model, Models
from serve_app.apis.openapi import AnthropicError, route
from serve_app.apis.requests import AnyRequest
from serve_app.apis.rerank import RerankBody, ScoreBody, parse_rerank, parse_score
from serve_app.apis.responses.recorder import ResponseRecorder
from serve_app.apis.responses.request import ResponsesBody
from serve_app.apis.responses.store import ResponseStore
from serve_app.apis.shared.generation import GenerationRequest
from serve_app.apis.tokens import (
    DetokenizeBody,
    TokenizeBody,
    parse_detokenize,
    parse_tokenize,
)
from serve_app.ingress.admission import MAX_IN_FLIGHT_HEADER, Admission
from serve_app.ingress.draining import Draining
from serve_app.ingress.http import (
    check_admin_key,
    check_key,
    is_anthropic,
    json_response,
    make_api,
    read_body,
    request_id,
    route_path,
)
from serve_app.ingress.keep_alive import HEADERS_AFTER_S, KEEP_ALIVE_COMMENT, KeepAliveStream
from serve_app.ingress.metrics import IngressMetrics, deployment_meter, read_routes
from serve_app.ingress.model_routes import ModelRoutes
from serve_app.ingress.sending import CHUNK_BYTES, EventStream, LargeResponse
from serve_app.metrics.definitions import SEQUENCES_IN_FLIGHT, SEQUENCES_LIMIT
from serve_app.metrics.exposition import CONTENT_TYPE
from serve_app.metrics.values import Snapshot, Values
from serve_app.settings import REPLICA, IngressConfig, IngressSettings, ServedModel

Items = AsyncGenerator[Any, None]  # a pair of HTTP status and bytes, then bytes
_LARGE_BODY = 2**16  # bytes; larger bodies are parsed in a thread
_METRICS = "/metrics"
_REBALANCE = "/v1/cluster/experts/rebalance"

api = make_api(meter_of=deployment_meter)


@serve.ingress(api)
class Ingress:
    """The HTTP endpoint: checks requests, passes them to a replica and streams the answers."""

    def __init__(self, replicas: Mapping[str, DeploymentHandle] | None = None) -> None:
        """`replicas` are those of models in the ingress's own application; others are found by their applications'
        names. Serve calls `reconfigure` next."""
        self._own_replicas = dict(replicas or {})
        self._routes = ModelRoutes(self._find_replicas)
        self._created = int(time.time())
        self._settings = IngressSettings()
        self._admission = Admission(self._max_in_flight, max_per_request=1)
        self._stored = ResponseStore(0, 0.0)
        self._draining = Draining()
        ingress = serve.get_replica_context().replica_id.unique_id
        self.metrics_of_http = IngressMetrics(self._ask_metrics, self._read_state, ingress)
        self._push = self.metrics_of_http.push_to_ray()
        freeze_gc_heap()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Takes up an IngressConfig in its JSON form; requests in flight go on as they began.

        A coroutine, since Serve runs plain functions in threads, where there is no event loop to watch health on.
        """
        config = IngressConfig.from_json(user_config)
        self._settings = settings = config.settings
        self._routes.configure(config)
        self._admission.max_per_request = max(model.max_ongoing_requests for model in config.models)
        self._stored.limit(int(settings.stored_responses_mib * 2**20), settings.stored_responses_s)

    def _find_replicas(self, model: ServedModel) -> DeploymentHandle:
        if model.application:
            return serve.get_deployment_handle(REPLICA, model.application)
        return self._own_replicas[model.name]

    def check_request(self, request: Request) -> None:
        """Raises RequestError if the key is missing or wrong (401, 403), if the service is full (429), or if it is
        shutting down (503). Called before the body is read."""
        path = route_path(request)
        if path != _METRICS:  # which tells how the service drains
            self._draining.check()
        if path == _REBALANCE:
            check_admin_key(request, self._settings.admin_key, self._settings.api_key)
            return
        check_key(request, self._settings.api_key)
        if request.method == "POST":
            self._admission.check()

    async def _ask_metrics(self, timeout_s: float) -> list[Snapshot | BaseException]:
        """The metrics of the replicas of all models, or why one does not tell them."""
        asked = (each.ask_each("metrics", timeout_s) for each in self._routes)
        return [answer for of_model in await asyncio.gather(*asked) for answer in of_model]

    def _read_state(self, values: Values) -> None:
        read_routes(values, self._routes)
        values.set(SEQUENCES_IN_FLIGHT, self._admission.in_flight)
        values.set(SEQUENCES_LIMIT, self._max_in_flight())

    def _max_in_flight(self) -> int:
        """This ingress's part of what the service takes: Serve's proxies spread requests evenly."""
        return math.ceil(self._routes.max_in_flight() / (serve.get_replica_context().world_size or 1))

    @api.post("/v1/chat/completions", **route("OpenAI: chat", ChatBody, streams=True))
    async def chat_completions(self, request: Request) -> Response:
        return await self._generate(request, parse_chat)

    @api.post("/v1/completions", **route("OpenAI: completions of text", CompletionBody, streams=True))
    async def completions(self, request: Request) -> Response:
        return await self._generate(request, parse_completion)

    @api.post("/v1/responses", **route("OpenAI: responses", ResponsesBody, streams=True))
    async def responses(self, request: Request) -> Response:
        recorder = ResponseRecorder(self._stored)
        return await self._generate(request, recorder.parse, recorder.record)

    @api.get("/v1/responses/{response_id}", **route("OpenAI: a stored response"))
    async def response(self, response_id: str) -> Response:
        return json_response(self._stored.response(response_id))

    @api.delete("/v1/responses/{response_id}", **route("OpenAI: forgets a stored response"))
    async def delete_response(self, response_id: str) -> Response:
        self._stored.delete(response_id)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    @api.post(
        "/v1/messages", **route("Anthropic: messages", MessagesBody, streams=True, error=AnthropicError)
    )
    async def messages(self, request: Request) -> Response:
        return await self._generate(request, parse_messages)

    @api.post(
        "/v1/messages/count_tokens",
        **route("Anthropic: the tokens of a prompt", CountTokensBody, error=AnthropicError),
    )
    async def count_tokens(self, request: Request) -> Response:
        return await self._generate(request, parse_count_tokens)

    @api.post("/v1/embeddings", **route("OpenAI: embeddings of texts", EmbeddingBody))
    async def embeddings(self, request: Request) -> Response:
        return await self._generate(request, parse_embedding)

    @api.post("/v1/rerank", **route("Cohere and Jina: documents in the order of their relevance", RerankBody))
    async def rerank(self, request: Request) -> Response:
        return await self._generate(request, parse_rerank)

    @api.post("/v1/score", **route("vLLM: the relevance of texts to others", ScoreBody))
    async def score(self, request: Request) -> Response:
        return await self._generate(request, parse_score)

    @api.post("/tokenize", **route("vLLM: text or messages to token ids", TokenizeBody))
    async def tokenize(self, request: Request) -> Response:
        return await self._generate(request, parse_tokenize)

    @api.post("/detokenize", **route("vLLM: token ids to text", DetokenizeBody))
    async def detokenize(self, request: Request) -> Response:
        return await self._generate(request, parse_detokenize)

    @api.get("/version", **route("vLLM: the version of this service"))
    async def version(self) -> Response:
        return json_response({"version": __version__})

    @api.get("/v1/models", **route("OpenAI, Anthropic: the models that are served"))
    @api.get("/v1/models/", include_in_schema=False)
    async def models(self, request: Request) -> Response:
        """The model list, in Anthropic's form if the request has its `anthropic-version` header."""
        models = await self._models()
        if is_anthropic(request):
            return json_response(models.anthropic_list(request.query_params))
        return json_response(models.openai_list())

    @api.get("/v1/models/{name:path}", **route("OpenAI, Anthropic: one model"))
    async def model(self, name: str, request: Request) -> Response:
        models = await self._models()
        form = models.anthropic_model if is_anthropic(request) else models.openai_model
        return json_response(form(name.removesuffix("/")))

    async def _models(self) -> Models:
        routes = list(self._routes)
        longest = await asyncio.gather(*(each.longest() for each in routes))
        return Models(
            tuple(
                Model(name, None if name == each.model.name else each.model.name, limit)
                for each, limit in zip(routes, longest, strict=True)
                for name in (each.model.name, *each.model.adapters)
            ),
            self._created,
        )

    @api.get("/health", **route("Whether this process lives and no engine is known to be lost"))
    async def health(self) -> Response:
        """200 unless every model had healthy replicas and has none now. Answers without asking replicas."""
        if all(each.state == "unhealthy" for each in self._routes):
            raise EngineDeadError("no replica is healthy")
        return json_response({"status": "ok"})

    @api.get("/ready", **route("Whether a request sent now would be answered"))
    async def ready(self, request: Request) -> Response:
        """The state of each model, or of the one that `?model=` names; 503 unless all are ready."""
        name = request.query_params.get("model", "")
        routes = [self._routes.find(name)] if name else list(self._routes)
        states = {each.model.name: each.state for each in routes}
        self._draining.check()
        if waiting := [f"{name!r} is {state}" for name, state in states.items() if state != "ready"]:
            raise EngineDeadError(f"not ready: {', '.join(waiting)}")
        return json_response({"status": "ready", "models": states})

    @api.get(_METRICS, include_in_schema=False)
    async def metrics(self) -> Response:
        """For Prometheus: this ingress's metrics and those of all replicas."""
        return Response(await self.metrics_of_http.page(), media_type=CONTENT_TYPE)

    @api.get("/v1/cluster/ranks", **route("Where ranks run and how they talk to each other"))
    async def ranks(self) -> Response:
        """Each replica's layout, backends, collectives, and the host, process and GPU of each rank."""
        return json_response({"object": "list", "data": await self._ask_all("ranks")})

    @api.get("/v1/cluster/experts", **route("The load of each expert"))
    async def experts(self) -> Response:
        """Each replica's expert load."""
        return json_response({"object": "list", "data": await self._ask_all("expert_load")})

    @api.post(_REBALANCE, **route("Rebalances the placement of experts"))
    async def rebalance_experts(self) -> Response:
        """Has each replica rebalance its experts by their load. Answers with the layers that each replica changed."""
        return json_response({"object": "list", "data": await self._ask_all("rebalance_experts")})

    async def _ask_all(self, method: str) -> list[Any]:
        """What the replicas of all models answer. Raises EngineDeadError if one is lost."""
        answers = await asyncio.gather(*(each.ask_all(method) for each in self._routes))
        return [answer for of_model in answers for answer in of_model]

    async def drain(self, timeout_s: float) -> int:
        """Refuses new requests and ends running ones after `timeout_s` seconds. Returns the number of running
        sequences."""
        self._draining.begin(timeout_s)
        return self._admission.in_flight

    async def _generate(
        self,
        http_request: Request,
        parse: Callable[[bytes], AnyRequest],
        observe: Callable[[Items], Items] = lambda items: items,
    ) -> Response:
        """Has a replica answer the request that `parse` reads from the body. `observe` wraps the answer's items."""
        with ExitStack() as resources:
            admitted = resources.enter_context(self._admission.admit())
            settings = self._settings
            body = await read_body(
                http_request, int(settings.max_request_mib * 2**20), settings.body_timeout_s
            )
            request = parse(body) if len(body) < _LARGE_BODY else await asyncio.to_thread(parse, body)
            model = self._routes.find(request.model)
            admitted.count(request.num_sequences)
            resources.enter_context(model.admission.admit()).count(request.num_sequences)
            answer = self._draining.watch(model.dispatcher.answer(request, request_id(http_request)))
            items = KeepAliveStream(observe(answer))
            streams = isinstance(request, GenerationRequest) and request.stream
            try:
                opening = await items.first(HEADERS_AFTER_S if streams else None)
            except BaseException:
                await items.aclose()
                raise
            status, first = opening or (HTTPStatus.OK, KEEP_ALIVE_COMMENT)
            timeout_s = settings.write_timeout_s
            if isinstance(request, GenerationRequest) and request.stream and status == HTTPStatus.OK:
                return self._with_limit(
                    EventStream(first, items, request.error_events, timeout_s, resources.pop_all())
                )
            await items.aclose()
        if len(first) > CHUNK_BYTES:
            return self._with_limit(LargeResponse(first, status, timeout_s))
        return self._with_limit(json_response(first, status))

    def _with_limit(self, response: Response) -> Response:
        """Adds the header that tells Serve's proxies how many requests may be in flight."""
        response.headers[MAX_IN_FLIGHT_HEADER] = str(self._max_in_flight())
        return response
