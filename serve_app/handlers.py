"""One request on one replica: prompt to token ids, the engine's steps to text, text to OpenAI's JSON.

No Ray and no HTTP here. Every engine step of a prompt becomes one `bytes` item, already serialised,
however many choices moved in it.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.errors import QwenDistError, RequestError
from qwen3_dist.sampling_params import SamplingParams
from serve_app.answers.base import Answer, usage
from serve_app.answers.chat import ChatAnswer
from serve_app.answers.completions import CompletionAnswer
from serve_app.choices import Choice, ChoiceDelta
from serve_app.protocol.chat import ChatRequest
from serve_app.protocol.completions import CompletionRequest
from serve_app.protocol.errors import error_object, to_json

logger = logging.getLogger("ray.serve")
DONE = b"data: [DONE]\n\n"


class RequestHandler:
    """Answers parsed requests with one engine, under the name the model is served by.

    `defaults` are the sampling parameters the checkpoint recommends.
    """

    def __init__(self, engine: AsyncEngine, model_name: str, defaults: Mapping[str, Any]) -> None:
        self._engine = engine
        self._model_name = model_name
        self._defaults = dict(defaults)

    async def respond(self, request: ChatRequest | CompletionRequest) -> bytes:
        """The whole answer as JSON. Raises RequestError or EngineDeadError."""
        prompts, params = await self._prepare(request)
        shown: dict[int, list[ChoiceDelta]] = defaultdict(list)
        async with aclosing(self._steps(prompts, params)) as steps:
            async for step in steps:
                for delta in step:
                    shown[delta.index].append(delta)
        choices = [shown[index] for index in sorted(shown)]
        counts = usage(sum(map(len, prompts)), sum(len(d.token_ids) for deltas in choices for d in deltas))
        return to_json(self._answer(request).response(choices, counts))

    async def stream(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[bytes, None]:
        """Server-sent events, one item a step, ended by `[DONE]`.

        An error before the first item is raised; a later one becomes an event, since the HTTP status
        has gone out by then.
        """
        prompts, params = await self._prepare(request)
        answer = self._answer(request)
        num_tokens, begun = 0, False
        try:
            async with aclosing(self._steps(prompts, params)) as steps:
                async for step in steps:
                    num_tokens += sum(len(delta.token_ids) for delta in step)
                    chunks = [answer.chunk(delta) for delta in step]
                    if events := b"".join(event(chunk) for chunk in chunks if chunk):
                        yield events
                        begun = True
        except Exception as error:
            if not begun:
                raise
            if not isinstance(error, QwenDistError):
                logger.exception("a stream broke off")
            yield event(error_object(error)) + DONE
            return
        last = answer.usage_chunk(usage(sum(map(len, prompts)), num_tokens))
        yield (event(last) if last else b"") + DONE

    def _answer(self, request: ChatRequest | CompletionRequest) -> Answer:
        form = ChatAnswer if isinstance(request, ChatRequest) else CompletionAnswer
        return form(self._model_name, self._engine.tokenizer, request.include_usage)

    async def _prepare(
        self, request: ChatRequest | CompletionRequest
    ) -> tuple[list[list[int]], SamplingParams]:
        """Token ids of every prompt, tokenized off the event loop, and the sampling parameters."""
        params = request.params(self._defaults)
        if params.stop and self._engine.tokenizer is None:
            raise RequestError(
                "stop needs a tokenizer, which this model lacks; use stop_token_ids", param="stop"
            )
        return await asyncio.to_thread(self._tokenize, request), params

    def _tokenize(self, request: ChatRequest | CompletionRequest) -> list[list[int]]:
        tokenizer = self._engine.tokenizer
        if isinstance(request, ChatRequest):
            template = self._engine.chat_template
            if tokenizer is None or template is None:
                lacks = "tokenizer" if tokenizer is None else "chat template"
                raise RequestError(
                    f"this model has no {lacks}, so it cannot chat; use /v1/completions", param="messages"
                )
            return [
                tokenizer.encode(template.render(request.messages, request.tools, **request.template_kwargs))
            ]
        prompts = []
        for prompt in request.prompts:
            if isinstance(prompt, str):
                if tokenizer is None:
                    raise RequestError(
                        "this model has no tokenizer; send the prompt as token ids", param="prompt"
                    )
                prompt = tokenizer.encode(prompt)
            prompts.append(prompt)
        return prompts

    async def _steps(
        self, prompts: list[list[int]], params: SamplingParams
    ) -> AsyncGenerator[list[ChoiceDelta], None]:
        """Steps of all prompts as they come; choice `i` of prompt `p` has index `p * n + i`."""
        streams = [self._prompt_steps(prompt, params, p * params.n) for p, prompt in enumerate(prompts)]
        merged = streams[0] if len(streams) == 1 else _merge(streams)
        async with aclosing(merged):
            async for step in merged:
                yield step

    async def _prompt_steps(
        self, prompt: list[int], params: SamplingParams, first_index: int
    ) -> AsyncGenerator[list[ChoiceDelta], None]:
        """Steps of one prompt, until every choice is done; leaving earlier aborts it in the engine."""
        choices = [Choice(first_index + i, params, self._engine.tokenizer) for i in range(params.n)]
        request_id = uuid.uuid4().hex
        async with aclosing(self._engine.generate(prompt, params, request_id)) as steps:
            async for step in steps:
                shown = []
                for delta in step:
                    if choices[delta.index].done:
                        continue
                    shown.append(choices[delta.index].advance(delta))
                    if choices[delta.index].done and delta.finish_reason is None:  # a stop string
                        self._engine.abort(request_id, delta.index)
                yield shown
                if all(choice.done for choice in choices):
                    return


async def _merge(
    streams: Sequence[AsyncGenerator[list[ChoiceDelta], None]],
) -> AsyncGenerator[list[ChoiceDelta], None]:
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


def event(chunk: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(chunk) + b"\n\n"
