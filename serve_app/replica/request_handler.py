"""One request on one replica: prompt to token ids, engine steps to text, text to the JSON of the API.

Neither Ray nor HTTP is used here. Each engine step of a prompt becomes one serialised `bytes` item, which covers all
choices that got tokens in that step.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.errors import ContextLengthError, EngineDeadError, QwenDistError, RequestError
from qwen3_dist.sampling_params import SamplingParams
from qwen3_dist.text.choice import ChoiceDelta, Choices, ParserSpec, join
from qwen3_dist.text.tool_calls.tags import ToolCallForm
from qwen3_dist.weights.fingerprint import fingerprint
from serve_app.apis.shared.answer import Answer, AnswerContext, Identity, Usage
from serve_app.apis.shared.errors import to_json
from serve_app.apis.shared.generation import GenerationRequest, with_identity
from serve_app.apis.shared.pooling import PoolingRequest
from serve_app.apis.shared.prompts import Prompt, PromptRenderer
from serve_app.apis.shared.resume import Resume, Sent
from serve_app.apis.tokens import TextRequest
from serve_app.failures import log_internal_error
from serve_app.metrics.requests import RequestMetrics
from serve_app.replica.merging import merge
from serve_app.replica.pooling import pool
from serve_app.replica.record import RequestRecord
from serve_app.replica.resuming import check_model, replay, resumed, sent_of

logger = logging.getLogger("ray.serve")
# What each part of the engine's output adds: for the client to see, and for another replica to go on after.
Step = tuple[list[ChoiceDelta], Sent]
Steps = AsyncGenerator[Step, None]
# Of a request that is read on the event loop: that takes about a millisecond at most.
_SHORT_BYTES = 4096
_ACCEPTED: Step = ([], ())  # the request is accepted


@dataclass(frozen=True)
class _Job:
    """A request, prepared for the engine, with the builder of its answer."""

    request: GenerationRequest
    prompts: list[list[int]]
    params: SamplingParams
    lora: str | None
    choices: list[Choices]  # of each prompt
    answer: Answer
    record: RequestRecord
    resume: Resume | None
    shown: dict[int, list[ChoiceDelta]]  # of each choice, if the answer is not streamed

    def show(self, delta: ChoiceDelta) -> bytes:
        """Counts what is shown of a choice. Returns its events if the answer is streamed, and keeps it if not."""
        self.answer.count(delta)
        if self.request.stream:
            return self.answer.delta(delta)
        self.shown[delta.index].append(delta)
        return b""

    @property
    def num_running(self) -> int:
        """The number of prompts with unfinished choices."""
        return sum(not choices.done for choices in self.choices)

    def params_of(self, p: int) -> SamplingParams:
        """The parameters of prompt `p`. Without a seed of the client's, each choice of each prompt has a seed of its
        own, made from the request's identity."""
        identity = self.request.identity
        if not p or identity is None or self.params.seed != identity.seed:
            return self.params
        return dataclasses.replace(self.params, seed=identity.seed + p * self.params.n)


class RequestHandler:
    """Answers parsed requests with one engine.

    `model_name` is the name that the base model is served under; a request with another name selects an adapter.
    `defaults` are the sampling parameters of the checkpoint's generation config. `template_kwargs` are default
    arguments of the chat template. `tool_calls` is the form of the model's tool calls; None detects it from the
    template. While `log_requests` is true, each prompt is logged.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        model_name: str,
        defaults: Mapping[str, Any],
        template_kwargs: Mapping[str, Any] | None = None,
        tool_calls: ToolCallForm | None = None,
        metrics: RequestMetrics | None = None,
    ) -> None:
        self.log_requests = False
        self._metrics = metrics or RequestMetrics()
        self._engine = engine
        self._model_name = model_name
        self._defaults = dict(defaults)
        settings = dict(template_kwargs or {}), tool_calls, str(engine.config.hf_overrides)
        self._fingerprint = fingerprint(engine.model_path, *settings)
        self._renderer = PromptRenderer(
            engine.tokenizer,
            engine.chat_template,
            engine.max_model_len,
            template_kwargs or {},
            tool_calls,
            engine.model_config.has_score,
        )

    async def respond(
        self, request: GenerationRequest | PoolingRequest | TextRequest, record: RequestRecord | None = None
    ) -> bytes:
        """The whole answer as JSON, serialised in a thread since it may take long. `record` takes what happens.

        Raises RequestError or EngineDeadError.
        """
        record = record or RequestRecord()
        record.model = self._model_and_adapter(request.model)[0]
        if isinstance(request, TextRequest):
            return to_json(await asyncio.to_thread(request.respond, self._renderer))
        if isinstance(request, PoolingRequest):
            pooled = await pool(
                self._engine,
                self._renderer,
                request,
                *self._model_and_adapter(request.model),
                record,
            )
            record.usage = Usage(pooled.num_tokens)
            self._metrics.pooled(record.arrival_s, len(pooled.vectors))
            return await asyncio.to_thread(lambda: to_json(request.answer(pooled)))
        *_, body = [item async for item in self.whole(request, record)]
        return body

    async def whole(
        self, request: GenerationRequest, record: RequestRecord, resume: Resume | None = None
    ) -> AsyncGenerator[bytes, None]:
        """An empty item per engine step, before which `record.sent` becomes what the step adds to the answer, then the
        whole answer as JSON. With `resume` the steps are those that follow what there is of the answer.

        Raises RequestError or EngineDeadError.
        """
        job = await self._prepare(request, record, resume)
        async with self._steps(job) as steps:
            async for shown, record.sent in steps:
                for delta in shown:
                    job.show(delta)
                yield b""
        choices = [deltas for _, deltas in sorted(job.shown.items())]
        body = await asyncio.to_thread(lambda: to_json(job.answer.full_response([*map(join, choices)])))
        record.ended, record.sent = True, ()
        yield body

    async def stream(
        self, request: GenerationRequest, record: RequestRecord | None = None, resume: Resume | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Server-sent events, one item per engine step, after an empty item once the request is accepted, or once it
        runs if it may wait only so long. Items of steps that show nothing are empty.

        With `resume` the events are those that follow what the client has. The request must have the identity that it
        had then. Before each item, `record.sent` becomes what the item adds to what the client has.

        An error before the first event is raised, as is the engine's death. Another one becomes an event, since the
        HTTP status has been sent; if it is a bug, it is logged under the record's id. `record` takes what happens.
        """
        record = record or RequestRecord()
        job = await self._prepare(request, record, resume)
        answer = job.answer
        waiting, begun, has_events = job.num_running, False, resume is not None and bool(resume.choices)
        if not waiting:
            yield b""
        sent: Sent = ()
        try:
            async with self._steps(job, announce=not request.terms.queue_timeout_s) as steps:
                async for step in steps:
                    if waiting:
                        waiting = waiting - 1 if step is _ACCEPTED else 0
                        if not waiting:
                            yield b""
                    if step is _ACCEPTED:
                        continue
                    shown, covered = step
                    for delta in shown:
                        answer.count(delta)
                    sent += covered
                    events = b"" if has_events else answer.begin()
                    for delta in shown:
                        events += answer.delta(delta)
                    if events or has_events:
                        record.sent, sent = sent, ()
                        yield events
                        begun = has_events = True
        except Exception as error:
            if isinstance(error, EngineDeadError) or (waiting and not begun):
                raise
            known = (
                error
                if isinstance(error, QwenDistError)
                else log_internal_error(error, logger, record.request_id)
            )
            record.ended = record.failed = True
            record.sent = ()
            yield answer.fail(known)
            return
        record.ended, record.sent = True, sent
        yield answer.end()

    def _model_and_adapter(self, name: str) -> tuple[str, str | None]:
        """The model name for the answer, and the adapter to use; None for the base model."""
        return name or self._model_name, name if name not in ("", self._model_name) else None

    async def _prepare(
        self, request: GenerationRequest, record: RequestRecord, resume: Resume | None = None
    ) -> _Job:
        try:
            return await self._job(with_identity(request), record, resume)
        except RequestError as error:
            raise request.with_client_names(error) from None

    async def _job(self, request: GenerationRequest, record: RequestRecord, resume: Resume | None) -> _Job:
        """Builds the job. Renders the template and tokenizes, in a thread if it may take long. Raises RequestError."""
        params = request.params(self._defaults)
        if params.stop and self._engine.tokenizer is None:
            raise RequestError(
                "stop needs a tokenizer, which this model lacks; use stop_token_ids", param="stop"
            )
        name, lora = self._model_and_adapter(request.model)
        record.model, record.params, record.stream = name, params, request.stream
        record.adapter = self._engine.config.lora.digest(lora)
        record.fingerprint = self._fingerprint_of(record)
        if resume:
            self._engine.config.lora.number(lora)  # an adapter that is gone is told before the model's change
            check_model(resume, record.fingerprint)
        is_short = record.num_bytes <= _SHORT_BYTES and not request.has_grammar
        read = self._read(request) if is_short else await asyncio.to_thread(self._read, request)
        prompts, parser_spec = read
        if "max_tokens" in request.sampling and params.max_tokens is not None:
            self._check_context(max(len(prompt.token_ids) for prompt in prompts), params.max_tokens)
        identity = request.identity or Identity()
        answer = request.answer(
            AnswerContext(
                name,
                self._engine.tokenizer,
                prompts,
                params.n,
                record.request_id,
                identity,
                self._weights_version,
            )
        )
        record.usage = answer.usage
        if self.log_requests:
            record.log_request(prompts, params)
        form = parser_spec.structured_outputs or params.structured_outputs
        seed = identity.seed if params.seed is None else params.seed
        others: Any = {"structured_outputs": form, "seed": seed}
        params = dataclasses.replace(params, reasoning=parser_spec.reasoning, **others)
        token_ids = [prompt.token_ids for prompt in prompts]
        choices = [
            Choices(params, self._engine.tokenizer, parser_spec, p * params.n) for p in range(len(prompts))
        ]
        job = _Job(request, token_ids, params, lora, choices, answer, record, resume, defaultdict(list))
        if resume and resume.choices:
            if request.stream:
                answer.begin()
            await asyncio.to_thread(replay, resume, job.show, choices, params)
        return job

    def _fingerprint_of(self, record: RequestRecord) -> str:
        """What tells what the answer comes from now: weights may change while it is generated."""
        weights = self._engine.config.weights
        return f"{self._fingerprint}{weights.digest}{weights.version}{record.adapter}"

    def _weights_version(self) -> str:
        return self._engine.config.weights.version

    def _read(self, request: GenerationRequest) -> tuple[list[Prompt], ParserSpec]:
        """The tokenized prompts, and how to parse the model's output."""
        prompts = request.prompts(self._renderer)
        return prompts, request.parser_spec(self._renderer, prompts[0])

    def _check_context(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Raises ContextLengthError if the prompt and the `max_tokens` that the client set exceed the context.

        A default `max_tokens` is clipped instead, by the engine.
        """
        context = self._engine.max_model_len
        if num_prompt_tokens < context < num_prompt_tokens + max_tokens:
            raise ContextLengthError(
                f"max_tokens={max_tokens} and the {num_prompt_tokens} tokens of the prompt exceed the "
                f"context of {context} tokens; lower max_tokens or shorten the prompt",
                "max_tokens",
                num_prompt_tokens,
                context,
                max_tokens,
            )

    @asynccontextmanager
    async def _steps(self, job: _Job, announce: bool = False) -> AsyncGenerator[Steps, None]:
        """A context with the steps of all prompts, interleaved. Choice `i` of prompt `p` has index `p * n + i`."""
        running = [p for p, choices in enumerate(job.choices) if not choices.done]
        streams = [self._prompt_steps(job, p, announce) for p in running]
        merged = streams[0] if len(streams) == 1 else merge(streams)
        try:
            async with aclosing(merged):
                yield merged
        except RequestError as error:
            raise job.request.with_client_names(error) from None

    async def _prompt_steps(self, job: _Job, p: int, announce: bool) -> Steps:
        """The steps of prompt `p` until all its choices are done. Closing early aborts the prompt in the engine."""
        prompt, choices, n = job.prompts[p], job.choices[p], job.params.n
        first_index, needs_scores = p * n, job.answer.repeats_logprobs or not job.request.stream
        params = job.params_of(p)
        request_id = job.record.engine_id()
        resume = resumed(job.resume, choices, first_index) if job.resume else None
        generated = self._engine.generate(
            prompt,
            params,
            request_id,
            job.request.terms,
            job.lora,
            announce=announce,
            resume=resume,
            on_wait=job.record.wait,
        )
        watch = self._metrics.watch(job.record.arrival_s, len(prompt), n)
        if resume is not None:
            watch.resume({index: len(output) for index, output in resume.items()})
        job.record.watches.append(watch)
        async with aclosing(generated) as steps:
            with watch:
                async for step in steps:
                    if not step:  # the request is accepted
                        yield _ACCEPTED
                        continue
                    job.record.fingerprint = self._fingerprint_of(job.record)
                    watch.generated(step)
                    shown = choices.advance(step, lambda index: self._engine.abort(request_id, index))
                    watch.shown(shown, first_index)
                    yield shown, sent_of(step, first_index, needs_scores)
                    if choices.done:
                        return
