"""The two Serve deployments: an ingress that speaks HTTP, and replicas that each own one engine.

A request crosses between them once, as a parsed request; its answer comes back as a first item that
holds the HTTP status and then one item of finished bytes per engine step.
"""

# No postponed annotations here: FastAPI reads those of the ingress's routes as the values they are.
import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from ray import serve
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from qwen3_dist import __version__
from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.engine.outputs import EngineStats
from qwen3_dist.errors import EngineDeadError, QwenDistError, RequestError
from qwen3_dist.garbage import exempt_present_objects
from qwen3_dist.text.tokenizer import read_generation_defaults
from serve_app.answers.messages import message_error
from serve_app.config import ServiceConfig
from serve_app.handlers import RequestHandler
from serve_app.http import ErrorForm, EventStream, json_response, make_api, read_body
from serve_app.openapi import ANTHROPIC_ERROR, route
from serve_app.protocol.chat import CHAT_BODY, parse_chat
from serve_app.protocol.completions import COMPLETION_BODY, parse_completion
from serve_app.protocol.embeddings import EMBEDDING_BODY, parse_embedding
from serve_app.protocol.errors import error_status, to_json
from serve_app.protocol.generation import GenerationRequest
from serve_app.protocol.messages import (
    COUNT_TOKENS_BODY,
    MESSAGES_BODY,
    parse_count_tokens,
    parse_messages,
)
from serve_app.protocol.pooling import PoolingRequest
from serve_app.protocol.relevance import RERANK_BODY, SCORE_BODY, parse_rerank, parse_score
from serve_app.protocol.responses import RESPONSES_BODY, parse_responses
from serve_app.protocol.tokens import (
    DETOKENIZE_BODY,
    TOKENIZE_BODY,
    TextRequest,
    parse_detokenize,
    parse_tokenize,
)

logger = logging.getLogger("ray.serve")
HEALTH_TIMEOUT_S = 5.0
AnyRequest = GenerationRequest | PoolingRequest | TextRequest
_LARGE_BODY = 2**16  # bytes that are not read on the event loop


class EngineReplica:
    """One engine and the answering of requests with it. Construction loads the model."""

    def __init__(self, config: ServiceConfig) -> None:
        self._engine = AsyncEngine(config.engine, parts_per_s=config.parts_per_s)
        logger.info("the engine is ready on %s", self._engine.backends)
        logger.info("its collectives: %s", self._engine.collectives)
        defaults = read_generation_defaults(self._engine.model_path)
        thinking = {} if config.enable_thinking is None else {"enable_thinking": config.enable_thinking}
        self._handler = RequestHandler(
            self._engine, config.served_name, defaults, thinking, config.tool_call_form
        )
        exempt_present_objects()

    async def answer(self, request: AnyRequest) -> AsyncGenerator[Any, None]:
        """A pair of the HTTP status and the body, or its first part if it is a stream; then the other parts.

        An error that the client can be told about is answered, not raised: Serve would log a
        traceback for each.
        """
        try:
            if not (isinstance(request, GenerationRequest) and request.stream):
                yield HTTPStatus.OK, await self._handler.respond(request)
                return
            stream = self._handler.stream(request)
            first = await anext(stream)
        except QwenDistError as error:
            yield error_status(error), to_json(request.error_body(error))
            return
        async with aclosing(stream):
            yield HTTPStatus.OK, first
            async for item in stream:
                yield item

    async def stats(self) -> EngineStats:
        """A reading of the engine's load."""
        return self._engine.stats()

    async def ranks(self) -> dict[str, Any]:
        """Where the engine's ranks run, on what, and how they talk to each other."""
        return {
            "layout": str(self._engine.config.layout),
            "backends": self._engine.backends,
            "collectives": self._engine.collectives,
            "ranks": [
                {
                    "rank": rank.rank,
                    "host": rank.host,
                    "pid": rank.pid,
                    "card": {"name": rank.card.name, "uuid": rank.card.uuid} if rank.card else None,
                }
                for rank in self._engine.ranks
            ],
        }

    async def expert_load(self) -> dict[str, Any]:
        """Tokens that chose each expert of each MoE layer so far, and where the experts lie."""
        return (await self._engine.expert_load()).to_json()

    async def rebalance_experts(self) -> list[int]:
        """Moves experts to where the load since the last time wants them; the layers that changed."""
        return await self._engine.rebalance_experts()

    async def max_model_len(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._engine.max_model_len

    async def check_health(self) -> None:
        """Raises EngineDeadError once a rank is lost; Serve then replaces this replica."""
        self._engine.check_health()

    def __del__(self) -> None:
        engine = self.__dict__.get("_engine")  # absent if construction failed
        if engine:
            engine.shutdown()


# What errors look like by path, where that is not OpenAI's object.
ERROR_FORMS: dict[str, ErrorForm] = {
    "/v1/messages": message_error,
    "/v1/messages/count_tokens": message_error,
}
api = make_api(ERROR_FORMS)


@serve.ingress(api)
class Ingress:
    """The HTTP endpoint: checks requests, passes them to a replica, streams what comes back."""

    def __init__(self, config: ServiceConfig, replicas: DeploymentHandle) -> None:
        self._model = config.served_name
        self._adapters = config.engine.lora.names
        self.api_key = config.api_key
        self._max_bytes = int(config.max_request_mib * 2**20)
        self._timeout_s = config.request_timeout_s
        self._replicas = replicas
        # Values travel by gRPC, which costs a third of what a stream of Ray's objects does.
        self._answers = replicas.options(
            method_name="answer",
            stream=True,
            _by_reference=False,
            request_serialization="pickle",
            response_serialization="pickle",
        )
        self._created = int(time.time())
        self._max_model_len: int | None = None
        exempt_present_objects()

    @api.post("/v1/chat/completions", **route("OpenAI: chat", CHAT_BODY, streams=True))
    async def chat_completions(self, request: Request) -> Response:
        return await self._generate(request, parse_chat)

    @api.post("/v1/completions", **route("OpenAI: completions of text", COMPLETION_BODY, streams=True))
    async def completions(self, request: Request) -> Response:
        return await self._generate(request, parse_completion)

    @api.post(
        "/v1/responses", **route("OpenAI: responses, none of them stored", RESPONSES_BODY, streams=True)
    )
    async def responses(self, request: Request) -> Response:
        return await self._generate(request, parse_responses)

    @api.post(
        "/v1/messages", **route("Anthropic: messages", MESSAGES_BODY, streams=True, error=ANTHROPIC_ERROR)
    )
    async def messages(self, request: Request) -> Response:
        return await self._generate(request, parse_messages)

    @api.post(
        "/v1/messages/count_tokens",
        **route("Anthropic: the tokens of a prompt", COUNT_TOKENS_BODY, error=ANTHROPIC_ERROR),
    )
    async def count_tokens(self, request: Request) -> Response:
        return await self._generate(request, parse_count_tokens)

    @api.post("/v1/embeddings", **route("OpenAI: embeddings of texts", EMBEDDING_BODY))
    async def embeddings(self, request: Request) -> Response:
        return await self._generate(request, parse_embedding)

    @api.post(
        "/v1/rerank", **route("Cohere and Jina: documents in the order of their relevance", RERANK_BODY)
    )
    async def rerank(self, request: Request) -> Response:
        return await self._generate(request, parse_rerank)

    @api.post("/v1/score", **route("vLLM: the relevance of texts to others", SCORE_BODY))
    async def score(self, request: Request) -> Response:
        return await self._generate(request, parse_score)

    @api.post("/tokenize", **route("vLLM: text or messages to token ids", TOKENIZE_BODY))
    async def tokenize(self, request: Request) -> Response:
        return await self._generate(request, parse_tokenize)

    @api.post("/detokenize", **route("vLLM: token ids to text", DETOKENIZE_BODY))
    async def detokenize(self, request: Request) -> Response:
        return await self._generate(request, parse_detokenize)

    @api.get("/version", **route("vLLM: the version of this service"))
    async def version(self) -> Response:
        return json_response({"version": __version__})

    @api.get("/v1/models", **route("OpenAI: the models that are served"))
    async def models(self) -> Response:
        names = (self._model, *self._adapters)
        return json_response({"object": "list", "data": [await self._model_object(name) for name in names]})

    @api.get("/v1/models/{name:path}", **route("OpenAI: one model"))
    async def model(self, name: str) -> Response:
        self._check_model(name)
        return json_response(await self._model_object(name))

    @api.get("/health", **route("Whether requests can be answered"))
    async def health(self) -> Response:
        """200 if some replica's engine is well, else 503."""
        try:
            # Asks every replica past its queue, so that a full one counts as well.
            checks = self._replicas.broadcast("check_health").results_async(return_exceptions=True)
            results = await asyncio.wait_for(checks, HEALTH_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001 - whatever keeps the replicas from answering
            results = [error]
        if any(result is None for result in results):
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

    @api.post("/v1/cluster/experts/rebalance", **route("Moves experts to where the load wants them"))
    async def rebalance_experts(self) -> Response:
        """Has each replica move its experts to where their load wants them; the layers each changed."""
        return json_response({"object": "list", "data": await self._ask_all("rebalance_experts")})

    async def _ask_all(self, method: str) -> list[Any]:
        """What every replica answers to a call without arguments. Raises EngineDeadError if one is lost."""
        try:
            return await self._replicas.broadcast(method).results_async()
        except Exception as error:
            raise EngineDeadError("a replica was lost or could not answer; ask again") from error

    async def _generate(self, asked: Request, parse: Callable[[bytes], AnyRequest]) -> Response:
        body = await read_body(asked, self._max_bytes)
        request = parse(body) if len(body) < _LARGE_BODY else await asyncio.to_thread(parse, body)
        self._check_model(request.model)
        items = self._answer(request)
        try:
            status, first = await anext(items)
        except BaseException:
            await items.aclose()
            raise
        if isinstance(request, GenerationRequest) and request.stream and status == HTTPStatus.OK:
            return EventStream(first, items, request.error_events)
        await items.aclose()
        return json_response(first, status)

    async def _answer(self, request: AnyRequest) -> AsyncGenerator[Any, None]:
        """A replica's items. Leaving early cancels the request there.

        Raises EngineDeadError if the replica is lost, RequestError if too many wait (429) or time is up (408).
        """
        response = self._answers.remote(request)
        assert isinstance(response, DeploymentResponseGenerator)
        now = asyncio.get_running_loop().time()
        deadline = now + self._timeout_s if self._timeout_s else None
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    item = await anext(response, None)
                if item is None:
                    return
                yield item
        except TimeoutError:
            raise RequestError(
                f"the request took longer than {self._timeout_s:g} seconds; ask for fewer tokens",
                status=HTTPStatus.REQUEST_TIMEOUT,
            ) from None
        except BackPressureError:
            raise RequestError(
                "too many requests wait already; send it again later", status=HTTPStatus.TOO_MANY_REQUESTS
            ) from None
        except Exception as error:
            logger.exception("a replica failed on a request")
            raise EngineDeadError("the replica that ran this request was lost; send it again") from error
        finally:
            with contextlib.suppress(Exception):  # it raises again what the request failed with
                response.cancel()

    def _check_model(self, name: str) -> None:
        if name not in ("", self._model, *self._adapters):
            served = ", ".join(map(repr, (self._model, *self._adapters)))
            raise RequestError(
                f"model {name!r} is not served here; {served} {'are' if self._adapters else 'is'}",
                param="model",
                status=HTTPStatus.NOT_FOUND,
            )

    async def _model_object(self, name: str) -> dict[str, Any]:
        """OpenAI's model object, with the model that an adapter is for, and vLLM's context length as a replica says
        it, once."""
        if self._max_model_len is None:
            self._max_model_len = next(iter(await self._ask_all("max_model_len")), None)
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "qwen3_dist",
            "parent": None if name == self._model else self._model,
            "max_model_len": self._max_model_len,
        }
