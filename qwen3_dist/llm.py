"""Offline generation: `LLM(model, layout="tp=2,ep=2").generate(prompts, SamplingParams(...))`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from qwen3_dist.engine.engine import PROMPT_ONLY, Engine
from qwen3_dist.engine.expert_load import ExpertLoad
from qwen3_dist.engine.rank_work import POLL_S
from qwen3_dist.engine.weight_changes import WeightsLoaded
from qwen3_dist.errors import QwenDistError, RequestError
from qwen3_dist.pooling_params import PoolingParams
from qwen3_dist.progress import Bar, progress_bar
from qwen3_dist.protocol.outputs import CompletionOutput, RequestOutput, TokenDelta
from qwen3_dist.protocol.sampling_setup import SamplingSetup
from qwen3_dist.sampling_params import SamplingParams
from qwen3_dist.settings import EngineConfig
from qwen3_dist.settings_reader import read_settings
from qwen3_dist.text.choice import ChoiceDelta, Choices, ParserSpec, join
from qwen3_dist.text.output_parser import AnswerParser
from qwen3_dist.text.reasoning import Reasoning, reasoning_state
from qwen3_dist.text.reranking import relevance, relevance_pooling, relevance_prompt
from qwen3_dist.text.tokenizer import Tokenizer, read_generation_defaults
from qwen3_dist.weights.version_files import with_digest
from qwen3_dist.weights_version import WeightsVersion

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


class LLM:
    """A model loaded on the ranks of `layout`, for generation without a server.

    `settings` are the other fields of `EngineConfig`, of which performance_mode is throughput here.
    Close it with `shutdown()`, or use it as a context manager. Raises what `Engine` raises.
    """

    def __init__(
        self, model: str = "", *, layout: str = "tp=1", use_tqdm: bool = True, **settings: Any
    ) -> None:
        own = {"model": str(model), "layout": layout, "performance_mode": "throughput"}
        config = read_settings(EngineConfig, own | settings)
        self._engine = Engine(config, show_progress=use_tqdm)
        self.config = config
        self.model_config = self._engine.model_config
        self.max_model_len = self._engine.max_model_len

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora: str | Sequence[str | None] | None = None,
        add_special_tokens: bool = True,
    ) -> list[RequestOutput]:
        """Completes one prompt or many, each a text or a list of token ids; results keep their order.

        Without `params` the sampling that the checkpoint's generation_config.json recommends is used. `lora` is
        the name of an adapter for all prompts, or one for each. Texts get what the checkpoint's tokenizer puts
        around one unless `add_special_tokens` is False.
        Raises RequestError, having generated nothing, if any prompt is refused.
        """
        batch = _as_batch(prompts)
        if params is None:
            params = SamplingParams(**read_generation_defaults(self._engine.model_path))
        given = _for_each(batch, params, "sampling params")
        adapters = _for_each(batch, lora, "adapters")
        token_ids = [self._token_ids(prompt, add_special_tokens) for prompt in batch]
        jobs = [self._prepare(*job) for job in zip(batch, token_ids, given, adapters, strict=True)]
        return self._run(jobs, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | None = None,
        use_tqdm: bool = True,
        tools: list[dict[str, Any]] | None = None,
        lora: str | Sequence[str | None] | None = None,
        **template_kwargs: Any,
    ) -> list[RequestOutput]:
        """Answers one conversation or many through the checkpoint's chat template."""
        template = self._engine.chat_template
        if template is None:
            raise RequestError("this checkpoint has no chat template; use generate()")
        conversations: Any = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [template.render(list(each), tools=tools, **template_kwargs) for each in conversations]
        return self.generate(prompts, params, use_tqdm, lora, add_special_tokens=False)

    def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **template_kwargs: Any
    ) -> Iterator[ChoiceDelta]:
        """Answers one conversation through the checkpoint's chat template, a delta for each step.

        Thoughts are the deltas' `reasoning`, the rest is their `text`. Leaving the iterator ends the generation.
        Raises RequestError if the conversation is refused.
        """
        engine = self._engine
        template, tokenizer = engine.chat_template, engine.tokenizer
        if template is None or tokenizer is None:
            raise RequestError("this checkpoint has no chat template or no tokenizer, so it cannot chat")
        if params is None:
            params = SamplingParams(**read_generation_defaults(engine.model_path))
        prompt = template.render(list(messages), **template_kwargs)  # type: ignore[arg-type]
        state = reasoning_state(prompt, template.source(), template_kwargs)
        token_ids = self._token_ids(prompt, add_special_tokens=False)
        self._require_awake()
        setup = self._prepare(prompt, token_ids, params, None).setup
        parser_spec = ParserSpec(state, new_parser=lambda begins, _: AnswerParser(Reasoning(begins), None))
        choices = Choices(params, tokenizer, parser_spec)
        engine.add_request("0", token_ids, params, setup=setup)
        try:
            while not choices.done:
                yield from choices.advance(engine.step().get("0", ()), lambda index: engine.abort("0", index))
        finally:
            engine.abort("0")

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        dimensions: int | None = None,
        normalize: bool = True,
        use_tqdm: bool = True,
        lora: str | Sequence[str | None] | None = None,
    ) -> list[list[float]]:
        """The vector of each prompt: the last token's hidden state, its first `dimensions` numbers, of length 1.

        Texts get what the checkpoint's tokenizer puts around them, token ids are taken as they are.
        Raises RequestError, having computed nothing, if any prompt is refused.
        """
        batch = _as_batch(prompts)
        token_ids = [self._token_ids(prompt, add_special_tokens=True) for prompt in batch]
        adapters = _for_each(batch, lora, "adapters")
        return self._pool(token_ids, PoolingParams(dimensions, normalize), adapters, use_tqdm)

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        instruction: str | None = None,
        use_tqdm: bool = True,
        lora: str | None = None,
    ) -> list[float]:
        """How likely a Qwen3-Reranker finds each document to be what `query` looks for, from 0 to 1.

        `instruction` says what for; absent, it is to answer a web search. Raises RequestError, having computed
        nothing, if a prompt is refused or the checkpoint's tokenizer does not know yes and no.
        """
        tokenizer = self._engine.tokenizer
        if tokenizer is None:
            raise RequestError("this checkpoint has no tokenizer, so it cannot rank documents")
        pooling = relevance_pooling(tokenizer, self.model_config.has_score)
        token_ids = [tokenizer.encode(relevance_prompt(query, each, instruction)) for each in documents]
        return [
            relevance(answer) for answer in self._pool(token_ids, pooling, [lora] * len(token_ids), use_tqdm)
        ]

    def expert_load(self) -> ExpertLoad:
        """Tokens that chose each expert of each MoE layer so far, and where the experts lie."""
        return self._engine.experts.load()

    def rebalance_experts(self) -> list[int]:
        """Moves experts to where the load since the last time wants them; the layers that changed."""
        self._require_awake()
        return self._engine.experts.rebalance_all()

    def update_weights(self, path: str, version: str = "") -> WeightsLoaded:
        """Loads the weights of the directory `path`, of the same architecture, in place of those of now; the prefix
        cache is empty afterwards. `version` is by default the directory's name.

        Raises CheckpointError or ResourceError if they cannot be loaded; then everything stays as it is.
        """
        engine = self._engine
        weights = WeightsVersion.of(str(path), version)
        read = with_digest(weights, self.model_config, engine.config.hf_overrides)
        loaded: WeightsLoaded = self._change(partial(engine.changes.weights.replace, read, False))
        return loaded

    def sleep(self, level: int = 1) -> None:
        """Gives up the memory of the KV cache and, on a GPU, moves the weights to host memory; at level 2 weights are
        dropped, and loaded again by `wake_up`. Nothing can be generated meanwhile."""
        self._change(partial(self._engine.changes.weights.sleep, level))

    def wake_up(self) -> None:
        """Ends `sleep`. Raises ResourceError if memory lacks, CheckpointError or ResourceError if weights that were
        dropped cannot be loaded; then it sleeps on."""
        self._change(self._engine.changes.weights.wake)

    def _change(self, begin: Callable[[Callable[[Any], None]], None]) -> Any:
        """Waits for a change of the ranks that `begin` begins. Returns its result or raises its error."""
        outcome: list[Any] = []
        begin(outcome.append)
        while not outcome:
            self._engine.step()
            time.sleep(POLL_S / 10)
        if isinstance(outcome[0], QwenDistError):
            raise outcome[0]
        return outcome[0]

    def _require_awake(self) -> None:
        if self._engine.changes.weights.asleep:
            raise RequestError("the engine sleeps; call wake_up() first")

    def shutdown(self) -> None:
        """Ends the ranks. May be called more than once."""
        self._engine.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    def _prepare(
        self, prompt: Prompt, token_ids: list[int], params: SamplingParams, lora: str | None
    ) -> _Job:
        self._engine.check(token_ids, params, lora)
        setup = self._engine.prepare(params)
        text = prompt if isinstance(prompt, str) else None
        return _Job(text, token_ids, params, self._engine.tokenizer, lora, setup)

    def _token_ids(self, prompt: Prompt, add_special_tokens: bool) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self._engine.tokenizer is None:
            raise RequestError(
                "this checkpoint has no tokenizer; give the prompt as token ids, or copy tokenizer.json to it"
            )
        return self._engine.tokenizer.encode(prompt, add_special_tokens)

    def _run(self, jobs: list[_Job], use_tqdm: bool) -> list[RequestOutput]:
        engine = self._engine
        self._require_awake()
        for number, job in enumerate(jobs):
            engine.add_request(str(number), job.prompt_token_ids, job.params, lora=job.lora, setup=job.setup)
        with self._progress(len(jobs), use_tqdm, "generating") as bar:
            while engine.has_work:
                for request_id, deltas in engine.step().items():
                    job = jobs[int(request_id)]
                    job.add(deltas, partial(engine.abort, request_id))
                    bar.update(job.just_finished())
        return [job.output() for job in jobs]

    def _pool(
        self, prompts: list[list[int]], pooling: PoolingParams, adapters: list[str | None], use_tqdm: bool
    ) -> list[list[float]]:
        engine = self._engine
        self._require_awake()
        for prompt, lora in zip(prompts, adapters, strict=True):
            engine.check(prompt, PROMPT_ONLY, lora, pooling)
        for number, (prompt, lora) in enumerate(zip(prompts, adapters, strict=True)):
            engine.add_request(str(number), prompt, PROMPT_ONLY, lora=lora, pooling=pooling)
        vectors: dict[int, list[float]] = {}
        with self._progress(len(prompts), use_tqdm, "pooling") as bar:
            while engine.has_work:
                for request_id, [delta] in engine.step().items():
                    assert delta.vector is not None
                    vectors[int(request_id)] = list(delta.vector)
                    bar.update()
        return [vectors[number] for number in range(len(prompts))]

    @contextlib.contextmanager
    def _progress(self, count: int, use_tqdm: bool, doing: str) -> Iterator[Bar]:
        """A progress bar over requests 0 to `count`; those that are left when an error ends it are aborted."""
        with progress_bar(use_tqdm, total=count, desc=doing, unit="prompt") as bar:
            try:
                yield bar
            finally:
                for number in range(count):
                    self._engine.abort(str(number))


class _Job:
    """One request of a batch and its choices."""

    def __init__(
        self,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        lora: str | None,
        setup: SamplingSetup | None,
    ) -> None:
        self.setup = setup
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.lora = lora
        self._choices = Choices(params, tokenizer, ParserSpec())
        self._deltas: list[list[ChoiceDelta]] = [[] for _ in range(params.n)]
        self._has_text = tokenizer is not None
        self._reported = False

    def add(self, deltas: Iterable[TokenDelta], abort: Callable[[int], object]) -> None:
        """Adds one step's deltas. Raises RequestError and calls `abort` as `Choices.advance` does."""
        for shown in self._choices.advance(deltas, abort):
            self._deltas[shown.index].append(shown)

    def just_finished(self) -> bool:
        """True once: the first time that all choices are finished."""
        done = not self._reported and self._choices.done
        self._reported |= done
        return done

    def output(self) -> RequestOutput:
        choices = [join(deltas) for deltas in self._deltas]
        outputs = []
        for choice in choices:
            assert choice.finish_reason is not None
            text = choice.text if self._has_text else None
            logprobs = list(choice.logprobs) or (None if self.params.logprobs is None else [])
            output = CompletionOutput(
                choice.index, list(choice.token_ids), text, choice.finish_reason, logprobs
            )
            outputs.append(output)
        prompt_logprobs = choices[0].prompt_logprobs
        return RequestOutput(
            self.prompt,
            self.prompt_token_ids,
            outputs,
            max(choice.num_cached_tokens for choice in choices),
            None if prompt_logprobs is None else list(prompt_logprobs),
        )


def _for_each(batch: list[Prompt], given: Any, what: str) -> list[Any]:
    """What was given for each prompt, or once for all."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        return [given] * len(batch)
    if len(given) != len(batch):
        raise RequestError(f"{len(given)} {what} for {len(batch)} prompts; give one or as many")
    return list(given)


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and all(isinstance(item, int) for item in prompts):
        return [list(prompts)]  # type: ignore[arg-type]
    return list(prompts)  # type: ignore[arg-type]
