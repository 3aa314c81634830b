"""The ingress: the Serve deployment that speaks HTTP and has requests answered by replicas.

A request crosses to a replica once, as a parsed request; its answer comes back as a first item that holds the HTTP
status and then one item of finished bytes per engine step.
"""

# No postponed annotations here: FastAPI reads those of the ingress's routes as the values they are.
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
from serve_app.ingress.admission import LIMIT_HEADER, Admission
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
from serve_app.ingress.late_stream import COMMENT, HEADERS_AFTER_S, LateStream
from serve_app.ingress.replica_health import ReplicaHealth
from serve_app.ingress.sending import PIECE, EventStream, LargeResponse
from serve_app.settings import ServiceConfig

Items = AsyncGenerator[Any, None]  # a pair of the HTTP status and bytes, then bytes
Heard = Callable[[Items], Items]
_LARGE_BODY = 2**16  # bytes that are not read on the event loop
_REBALANCE = "/v1/cluster/experts/rebalance"

api = make_api()


@serve.ingress(api)
class Ingress:
    """The HTTP endpoint: checks requests, passes them to a replica, streams what comes back."""

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
        self._dispatcher = Dispatcher(answers.remote, config.request_timeout_s, self._health.doubt)
        self._admission = Admission(self._most_in_flight, config.max_ongoing_requests)
        self._stored = ResponseStore(int(config.stored_responses_mib * 2**20), config.stored_responses_s)
        self._draining = Draining()
        self._max_model_len: int | None = None
        freeze_gc_heap()

    def let_in(self, request: Request) -> None:
        """Raises RequestError for a request without the key it needs (401, 403), or without room for it (429), or to a
        service that is shutting down (503)."""
        self._draining.check()
        path = route_path(request)
        if path == _REBALANCE:
            check_admin_key(request, self._config.admin_key, self._config.api_key)
            return
        check_key(request, self._config.api_key)
        if request.method == "POST":
            self._admission.check()

    def _most_in_flight(self) -> int:
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
        """In Anthropic's form where its header asks for that."""
        longest = await self._longest()
        if is_anthropic(request):
            return json_response(self._models.anthropic_list(longest, request.query_params))
        return json_response(self._models.openai_list(longest))

    @api.get("/v1/models/{name:path}", **route("OpenAI, Anthropic: one model"))
    async def model(self, name: str, request: Request) -> Response:
        name = name.removesuffix("/")
        self._models.check(name)
        form = self._models.anthropic_model if is_anthropic(request) else self._models.openai_model
        return json_response(form(name, await self._longest()))

    @api.get("/health", **route("Whether requests can be answered"))
    async def health(self) -> Response:
        """200 if some replica's engine was well when last asked, else 503; nobody is waited for."""
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

    @api.post(_REBALANCE, **route("Moves experts to where the load wants them"))
    async def rebalance_experts(self) -> Response:
        """Has each replica move its experts to where their load wants them; the layers each changed."""
        return json_response({"object": "list", "data": await self._ask_all("rebalance_experts")})

    async def drain(self, timeout_s: float) -> int:
        """Refuses new requests and ends running ones in `timeout_s` seconds; the number of sequences that run."""
        self._draining.begin(timeout_s)
        return self._admission.in_flight

    async def _ask_all(self, method: str) -> list[Any]:
        """What every replica answers to a call without arguments. Raises EngineDeadError if one is lost."""
        try:
            return await self._replicas.broadcast(method).results_async()
        except Exception as error:
            raise EngineDeadError("a replica was lost or could not answer; ask again") from error

    async def _generate(
        self, asked: Request, parse: Callable[[bytes], AnyRequest], heard: Heard = lambda items: items
    ) -> Response:
        with ExitStack() as held:
            admitted = held.enter_context(self._admission.admit())
            body = await read_body(asked, self._max_bytes, self._config.body_timeout_s)
            request = parse(body) if len(body) < _LARGE_BODY else await asyncio.to_thread(parse, body)
            if request.model:
                self._models.check(request.model)
            admitted.count(request.num_sequences)
            answer = self._draining.watch(self._dispatcher.answer(request, request_id(asked)))
            items = LateStream(heard(answer))
            streams = isinstance(request, GenerationRequest) and request.stream
            try:
                opening = await items.first(HEADERS_AFTER_S if streams else None)
            except BaseException:
                await items.aclose()
                raise
            status, first = opening or (HTTPStatus.OK, COMMENT)
            patience_s = self._config.write_timeout_s
            if isinstance(request, GenerationRequest) and request.stream and status == HTTPStatus.OK:
                return self._limited(
                    EventStream(first, items, request.error_events, patience_s, held.pop_all())
                )
            await items.aclose()
        if len(first) > PIECE:
            return self._limited(LargeResponse(first, status, patience_s))
        return self._limited(json_response(first, status))

    def _limited(self, response: Response) -> Response:
        """An answer that tells Serve's proxies how many requests may be in flight."""
        response.headers[LIMIT_HEADER] = str(self._most_in_flight())
        return response

    async def _longest(self) -> int | None:
        """Most tokens of prompt and answer together, as a replica says it, once."""
        if self._max_model_len is None:
            self._max_model_len = next(iter(await self._ask_all("max_model_len")), None)
        return self._max_model_len
