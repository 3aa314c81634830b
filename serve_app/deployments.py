"""The two Serve deployments: an ingress that speaks HTTP, and replicas that each own one engine.

A request crosses between them once, as a parsed request; its answer comes back as a first item that
holds the HTTP status and then one item of finished bytes per engine step.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.types import Send

from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.engine.outputs import EngineStats
from qwen3_dist.errors import EngineDeadError, QwenDistError, RequestError
from qwen3_dist.text.tokenizer import read_generation_defaults
from qwen3_dist.weights.source import resolve_model
from serve_app.config import ServiceConfig
from serve_app.handlers import DONE, RequestHandler, event
from serve_app.protocol import (
    ChatRequest,
    CompletionRequest,
    error_form,
    error_object,
    error_status,
    parse_chat,
    parse_completion,
    to_json,
)

logger = logging.getLogger("ray.serve")
HEALTH_TIMEOUT_S = 5.0


class EngineReplica:
    """One engine and the answering of requests with it. Construction loads the model."""

    def __init__(self, config: ServiceConfig) -> None:
        self._engine = AsyncEngine(config.engine)
        model = resolve_model(config.engine.model, config.engine.revision)
        self._handler = RequestHandler(self._engine, config.served_name, read_generation_defaults(model))

    async def answer(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[Any, None]:
        """The HTTP status, then the body's bytes.

        An error that the client can be told about is answered, not raised: Serve would log a
        traceback for each.
        """
        if not request.stream:
            yield await self._respond(request)
            return
        stream = self._handler.stream(request)
        async with aclosing(stream):
            try:
                first = await anext(stream)
            except QwenDistError as error:
                yield error_status(error), to_json(error_object(error))
                return
            yield HTTPStatus.OK, first
            async for item in stream:
                yield item

    async def _respond(self, request: ChatRequest | CompletionRequest) -> tuple[int, bytes]:
        try:
            return HTTPStatus.OK, await self._handler.respond(request)
        except QwenDistError as error:
            return error_status(error), to_json(error_object(error))

    async def stats(self) -> EngineStats:
        """A reading of the engine's load."""
        return self._engine.stats()

    async def check_health(self) -> None:
        """Raises EngineDeadError once a rank is lost; Serve then replaces this replica."""
        self._engine.check_health()

    def __del__(self) -> None:
        if engine := self.__dict__.get("_engine"):
            engine.shutdown()


api = FastAPI(title="qwen3_dist", description="OpenAI-compatible inference for Qwen3.")


@api.exception_handler(QwenDistError)
async def _answer_error(_: Request, error: QwenDistError) -> Response:
    return _json(error_object(error), error_status(error))


@api.exception_handler(HTTPException)
async def _answer_http_error(request: Request, error: HTTPException) -> Response:
    return _json(
        error_form(f"{request.method} {request.url.path}: {error.detail}", error.status_code),
        error.status_code,
    )


@serve.ingress(api)
class Ingress:
    """The HTTP endpoint: checks requests, passes them to a replica, streams what comes back."""

    def __init__(self, config: ServiceConfig, replicas: DeploymentHandle) -> None:
        self._model = config.served_name
        self._max_bytes = int(config.max_request_mib * 2**20)
        self._replicas = replicas
        self._answers = replicas.options(method_name="answer", stream=True)
        self._created = int(time.time())

    @api.post("/v1/chat/completions")
    async def chat_completions(self, request: Request) -> Response:
        return await self._generate(request, parse_chat)

    @api.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        return await self._generate(request, parse_completion)

    @api.get("/v1/models")
    async def models(self) -> Response:
        return _json({"object": "list", "data": [self._model_object()]})

    @api.get("/v1/models/{name:path}")
    async def model(self, name: str) -> Response:
        self._check_model(name)
        return _json(self._model_object())

    @api.get("/health")
    async def health(self) -> Response:
        """200 if some replica's engine is well, else 503."""
        try:
            # Every replica is asked beside its queue, so that a full one still counts as well.
            checks = self._replicas.broadcast("check_health").results_async(return_exceptions=True)
            results = await asyncio.wait_for(checks, HEALTH_TIMEOUT_S)
        except Exception as error:  # no replica, or none that answers
            results = [error]
        if any(result is None for result in results):
            return _json({"status": "ok"})
        return _json(
            error_form("no replica is healthy", HTTPStatus.SERVICE_UNAVAILABLE),
            HTTPStatus.SERVICE_UNAVAILABLE,
        )

    async def _generate(
        self, http: Request, parse: Callable[[bytes], ChatRequest | CompletionRequest]
    ) -> Response:
        request = parse(await _read_body(http, self._max_bytes))
        self._check_model(request.model)
        items = self._answer(request)
        try:
            status, first = await anext(items)
        except BaseException:
            await items.aclose()
            raise
        if request.stream and status == HTTPStatus.OK:
            return _EventStream(
                _chain(first, items), media_type="text/event-stream", headers={"cache-control": "no-cache"}
            )
        await items.aclose()
        return Response(first, status, media_type="application/json")

    async def _answer(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[Any, None]:
        """A replica's items. Leaving early cancels the request there; a lost replica is EngineDeadError."""
        response = self._answers.remote(request)
        try:
            async for item in response:
                yield item
        except Exception as error:
            logger.exception("a replica failed on a request")
            raise EngineDeadError("the replica that ran this request was lost; send it again") from error
        finally:
            response.cancel()

    def _check_model(self, name: str) -> None:
        if name != self._model:
            raise RequestError(
                f"model {name!r} is not served here; {self._model!r} is",
                param="model",
                status=HTTPStatus.NOT_FOUND,
            )

    def _model_object(self) -> dict[str, Any]:
        return {"id": self._model, "object": "model", "created": self._created, "owned_by": "qwen3_dist"}


class _EventStream(StreamingResponse):
    """A stream that closes its source also when the client leaves in the middle of a send."""

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self.body_iterator):  # type: ignore[type-var]
            await super().stream_response(send)


async def _chain(first: bytes, items: AsyncGenerator[Any, None]) -> AsyncIterator[bytes]:
    """`first`, then `items`; an error becomes the last event."""
    async with aclosing(items):
        yield first
        try:
            async for item in items:
                yield item
        except EngineDeadError as error:
            yield event(error_object(error)) + DONE


async def _read_body(http: Request, limit: int) -> bytes:
    body = bytearray()
    async for part in http.stream():
        body += part
        if len(body) > limit:
            raise RequestError(
                f"the request body is larger than {limit} bytes; send a shorter one",
                status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            )
    return bytes(body)


def _json(value: dict[str, Any], status: int = HTTPStatus.OK) -> Response:
    return Response(to_json(value), status, media_type="application/json")
