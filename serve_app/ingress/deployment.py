"""The ingress: the Serve deployment that speaks HTTP and passes requests to replicas.

A request is sent to a replica once, already parsed. The answer comes back as a pair of HTTP status and bytes, then,
for a stream, one item of serialised events per engine step.
"""

# No `from __future__ import annotations` here: FastAPI evaluates the annotations of the routes.
import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.ray_private import stream_by_grpc
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
from serve_app.apis.models import Models
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
from serve_app.ingress.dispatch import Dispatcher
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
from serve_app.ingress.replica_health import ReplicaHealth
from serve_app.ingress.sending import CHUNK_BYTES, EventStream, LargeResponse
from serve_app.settings import ServiceConfig

Items = AsyncGenerator[Any, None]  # a pair of HTTP status and bytes, then bytes
_LARGE_BODY = 2**16  # bytes; larger bodies are parsed in a thread
_REBALANCE = "/v1/cluster/experts/rebalance"

api = make_api()


@serve.ingress(api)
class Ingress:
    """The HTTP endpoint: checks requests, passes them to a replica and streams the answers."""

    def __init__(self, config: ServiceConfig, replicas: DeploymentHandle) -> None:
        self._models = Models((config.served_name, *config.engine.lora.names), int(time.time()))
        self._config = config
        self._max_bytes = int(config.max_request_mib * 2**20)
        self._replicas = replicas
        answers = stream_by_grpc(replicas, "answer")
        self._health = ReplicaHealth(
            lambda: replicas.broadcast("check_health").results_async(return_exceptions=True),
            config.health_check_period_s,
            2 * config.health_check_timeout_s,
        )
        self._dispatcher = Dispatcher(answers.remote, config.request_timeout_s, self._health.poll_soon)
        self._admission = Admission(self._max_in_flight, config.max_ongoing_requests)
        self._stored = ResponseStore(int(config.stored_responses_mib * 2**20), config.stored_responses_s)
        self._draining = Draining()
        self._max_model_len: int | None = None
        freeze_gc_heap()

    def check_request(self, request: Request) -> None:
        """Raises RequestError if the key is missing or wrong (401, 403), if the service is full (429), or if it is
        shutting down (503). Called before the body is read."""
        self._draining.check()
        path = route_path(request)
        if path == _REBALANCE:
            check_admin_key(request, self._config.admin_key, self._config.api_key)
            return
        check_key(request, self._config.api_key)
        if request.method == "POST":
            self._admission.check()

    def _max_in_flight(self) -> int:
        replicas = max(self._health.num_healthy, self._config.min_replicas)
        return replicas * self._config.max_ongoing_requests + self._config.max_queued_requests

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
        max_model_len = await self._get_max_model_len()
        if is_anthropic(request):
            return json_response(self._models.anthropic_list(max_model_len, request.query_params))
        return json_response(self._models.openai_list(max_model_len))

    @api.get("/v1/models/{name:path}", **route("OpenAI, Anthropic: one model"))
    async def model(self, name: str, request: Request) -> Response:
        name = name.removesuffix("/")
        self._models.check(name)
        form = self._models.anthropic_model if is_anthropic(request) else self._models.openai_model
        return json_response(form(name, await self._get_max_model_len()))

    @api.get("/health", **route("Whether requests can be answered"))
    async def health(self) -> Response:
        """200 if at least one replica was healthy at the last periodic check, else 503. Answers without asking
        replicas."""
        if self._health.num_healthy:
            return json_response({"status": "ok"})
        raise EngineDeadError("no replica is healthy")

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

    async def drain(self, timeout_s: float) -> int:
        """Refuses new requests and ends running ones after `timeout_s` seconds. Returns the number of running
        sequences."""
        self._draining.begin(timeout_s)
        return self._admission.in_flight

    async def _ask_all(self, method: str) -> list[Any]:
        """Calls `method` on every replica; one result each. Raises EngineDeadError if a replica is lost."""
        try:
            return await self._replicas.broadcast(method).results_async()
        except Exception as error:
            raise EngineDeadError("a replica was lost or could not answer; ask again") from error

    async def _generate(
        self,
        http_request: Request,
        parse: Callable[[bytes], AnyRequest],
        observe: Callable[[Items], Items] = lambda items: items,
    ) -> Response:
        """Has a replica answer the request that `parse` reads from the body. `observe` wraps the answer's items."""
        with ExitStack() as resources:
            admitted = resources.enter_context(self._admission.admit())
            body = await read_body(http_request, self._max_bytes, self._config.body_timeout_s)
            request = parse(body) if len(body) < _LARGE_BODY else await asyncio.to_thread(parse, body)
            if request.model:
                self._models.check(request.model)
            admitted.count(request.num_sequences)
            answer = self._draining.watch(self._dispatcher.answer(request, request_id(http_request)))
            items = KeepAliveStream(observe(answer))
            streams = isinstance(request, GenerationRequest) and request.stream
            try:
                opening = await items.first(HEADERS_AFTER_S if streams else None)
            except BaseException:
                await items.aclose()
                raise
            status, first = opening or (HTTPStatus.OK, KEEP_ALIVE_COMMENT)
            timeout_s = self._config.write_timeout_s
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

    async def _get_max_model_len(self) -> int | None:
        """Most tokens of prompt and output together. Asked of a replica once, then cached."""
        if self._max_model_len is None:
            self._max_model_len = next(iter(await self._ask_all("max_model_len")), None)
        return self._max_model_len
