"""One request on one replica: prompt to token ids, the engine's steps to text, text to the API's JSON.

No Ray and no HTTP here. Every engine step of a prompt becomes one `bytes` item, already serialised,
however many choices moved in it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.errors import ContextLengthError, QwenDistError, RequestError
from qwen3_dist.sampling_params import SamplingParams
from qwen3_dist.text.choice import ChoiceDelta, Choices, ParserSpec, join
from qwen3_dist.text.tool_calls.tags import ToolCallForm
from serve_app.apis.shared.answer import Answer, AnswerContext
from serve_app.apis.shared.errors import to_json
from serve_app.apis.shared.generation import GenerationRequest
from serve_app.apis.shared.pooling import PoolingRequest
from serve_app.apis.shared.prompts import Prompt, PromptRenderer
from serve_app.apis.tokens import TextRequest
from serve_app.failures import failure
from serve_app.replica.pooling import pool

logger = logging.getLogger("ray.serve")
Steps = AsyncGenerator[list[ChoiceDelta], None]


@dataclass(frozen=True)
class _Job:
    """A request as the engine takes it, and the form its answer takes."""

    request: GenerationRequest
    prompts: list[list[int]]
    params: SamplingParams
    priority: int
    lora: str | None
    parser_spec: ParserSpec
    answer: Answer


class RequestHandler:
    """Answers parsed requests with one engine, under the name the model is served by; other names are adapters'.

    `defaults` are the sampling parameters the checkpoint recommends, `template_kwargs` what the service tells
    the chat template where a request says nothing, `tool_calls` the form of the model's tool calls, if the
    template does not show it.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        model_name: str,
        defaults: Mapping[str, Any],
        template_kwargs: Mapping[str, Any] | None = None,
        tool_calls: ToolCallForm | None = None,
    ) -> None:
        self._engine = engine
        self._model_name = model_name
        self._defaults = dict(defaults)
        self._renderer = PromptRenderer(
            engine.tokenizer, engine.chat_template, engine.max_model_len, template_kwargs or {}, tool_calls
        )

    async def respond(self, request: GenerationRequest | PoolingRequest | TextRequest) -> bytes:
        """The whole answer as JSON, which may take seconds to build, so a thread does. Raises RequestError or
        EngineDeadError."""
        if isinstance(request, TextRequest):
            return to_json(await asyncio.to_thread(request.respond, self._renderer))
        if isinstance(request, PoolingRequest):
            pooled = await pool(self._engine, self._renderer, request, *self._named(request.model))
            return await asyncio.to_thread(lambda: to_json(request.answer(pooled)))
        job = await self._prepare(request)
        shown: dict[int, list[ChoiceDelta]] = defaultdict(list)
        async with aclosing(self._steps(job)) as steps:
            async for step in steps:
                for delta in step:
                    job.answer.count(delta)
                    shown[delta.index].append(delta)
        return await asyncio.to_thread(
            lambda: to_json(job.answer.full_response([join(shown[index]) for index in sorted(shown)]))
        )

    async def stream(self, request: GenerationRequest, request_id: str = "") -> AsyncGenerator[bytes, None]:
        """Server-sent events, one item a step.

        An error before the first item is raised; a later one becomes an event, since the HTTP status
        has gone out by then. A later bug is logged under `request_id`.
        """
        job = await self._prepare(request)
        begun = False
        try:
            async with aclosing(self._steps(job)) as steps:
                async for step in steps:
                    for delta in step:
                        job.answer.count(delta)
                    events = b"" if begun else job.answer.begin()
                    events += b"".join([job.answer.delta(delta) for delta in step])
                    if events:
                        yield events
                        begun = True
        except Exception as error:
            if not begun:
                raise
            told = error if isinstance(error, QwenDistError) else failure(error, logger, request_id)
            yield job.answer.fail(told)
            return
        yield job.answer.end()

    def _named(self, name: str) -> tuple[str, str | None]:
        """What a request calls the model, and the adapter that this is."""
        return name or self._model_name, name if name not in ("", self._model_name) else None

    async def _prepare(self, request: GenerationRequest) -> _Job:
        try:
            return await self._job(request)
        except RequestError as error:
            raise request.with_client_names(error) from None

    async def _job(self, request: GenerationRequest) -> _Job:
        """Checks what needs the model; tokenizes off the event loop."""
        params = request.params(self._defaults)
        if params.stop and self._engine.tokenizer is None:
            raise RequestError(
                "stop needs a tokenizer, which this model lacks; use stop_token_ids", param="stop"
            )
        name, lora = self._named(request.model)
        prompts, parser_spec = await asyncio.to_thread(self._read, request)
        if "max_tokens" in request.sampling and params.max_tokens is not None:
            self._check_room(max(len(prompt.token_ids) for prompt in prompts), params.max_tokens)
        answer = request.answer(AnswerContext(name, self._engine.tokenizer, prompts, params.n))
        form = parser_spec.structured_outputs or params.structured_outputs
        params = dataclasses.replace(params, reasoning=parser_spec.reasoning, structured_outputs=form)
        token_ids = [prompt.token_ids for prompt in prompts]
        return _Job(request, token_ids, params, request.priority, lora, parser_spec, answer)

    def _read(self, request: GenerationRequest) -> tuple[list[Prompt], ParserSpec]:
        """Its prompts, and how what follows them is to be read. May take a while."""
        prompts = request.prompts(self._renderer)
        return prompts, request.parser_spec(self._renderer, prompts[0])

    def _check_room(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Refuses a limit that the client set and the context does not hold; a default is cut instead."""
        most = self._engine.max_model_len
        if num_prompt_tokens < most < num_prompt_tokens + max_tokens:
            raise ContextLengthError(
                f"max_tokens={max_tokens} and the {num_prompt_tokens} tokens of the prompt are more than the "
                f"context of {most} tokens; lower max_tokens or shorten the prompt",
                "max_tokens",
                num_prompt_tokens,
                most,
                max_tokens,
            )

    async def _steps(self, job: _Job) -> Steps:
        """Steps of all prompts as they come; choice `i` of prompt `p` has index `p * n + i`."""
        n = job.params.n
        streams = [self._prompt_steps(job, prompt, p * n) for p, prompt in enumerate(job.prompts)]
        merged = streams[0] if len(streams) == 1 else _merge(streams)
        try:
            async with aclosing(merged):
                async for step in merged:
                    yield step
        except RequestError as error:
            raise job.request.with_client_names(error) from None

    async def _prompt_steps(self, job: _Job, prompt: list[int], first_index: int) -> Steps:
        """Steps of one prompt, until every choice is done; leaving earlier aborts it in the engine."""
        params = job.params
        choices = Choices(params, self._engine.tokenizer, job.parser_spec, first_index)
        request_id = uuid.uuid4().hex
        generated = self._engine.generate(prompt, params, request_id, job.priority, job.lora)
        async with aclosing(generated) as steps:
            async for step in steps:
                yield choices.advance(step, lambda index: self._engine.abort(request_id, index))
                if choices.done:
                    return


async def _merge(streams: Sequence[Steps]) -> Steps:
    """Items of all `streams` as they come. Leaving early closes every stream."""
    pending = {asyncio.ensure_future(anext(stream)): stream for stream in streams}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                stream = pending.pop(task)
                try:
                    item = task.result()
                except StopAsyncIteration:
                    continue
                pending[asyncio.ensure_future(anext(stream))] = stream
                yield item
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        await asyncio.gather(*(stream.aclose() for stream in streams))
