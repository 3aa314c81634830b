"""The engine: schedule, run, postprocess. It must be called from one thread; `async_engine.py` runs it in its own."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as IntSequence
from dataclasses import dataclass, replace
from typing import Any

from qwen3_dist.engine.block_manager import BlockManager
from qwen3_dist.engine.built_grammars import BuiltGrammars
from qwen3_dist.engine.engine_stats import adapters_in_use, counts_of_groups, read_load, read_stats
from qwen3_dist.engine.expert_load import initial_placements
from qwen3_dist.engine.in_flight import StepsInFlight
from qwen3_dist.engine.model_check import checked_model, pinned
from qwen3_dist.engine.rank_changes import RankChanges
from qwen3_dist.engine.rank_pace import RankPaces
from qwen3_dist.engine.regrouping import Recovery, Regrouping
from qwen3_dist.engine.request_checks import check_output, check_prompt, max_model_len
from qwen3_dist.engine.request_setup import make_setup
from qwen3_dist.engine.scheduler import Advance, Scheduler
from qwen3_dist.engine.scheduler_counts import SchedulerCounts
from qwen3_dist.engine.sequence import Sequence
from qwen3_dist.engine.step_meter import StepMeter
from qwen3_dist.engine.step_traffic import StepTraffic
from qwen3_dist.launch import Executor, make_executor, require_device
from qwen3_dist.pooling_params import PoolingParams
from qwen3_dist.progress import loading_bar
from qwen3_dist.protocol.outputs import EngineLoad, EngineStats, TokenDelta
from qwen3_dist.protocol.sampling_setup import SamplingSetup
from qwen3_dist.protocol.step_limits import SchedulerLimits
from qwen3_dist.protocol.step_plan import StepPlan
from qwen3_dist.request_terms import DEFAULT_TERMS, RequestTerms
from qwen3_dist.sampling_params import SamplingParams
from qwen3_dist.settings import EngineConfig
from qwen3_dist.text.chat_template import ChatTemplate
from qwen3_dist.text.sidecars import read_eos_token_ids
from qwen3_dist.text.tokenizer import Tokenizer
from qwen3_dist.weights.source import resolve_model

PROMPT_ONLY = SamplingParams(max_tokens=0)
Outputs = dict[str, list[TokenDelta]]  # the deltas of one step by request id
Resumed = Mapping[int, IntSequence[int]]  # the output tokens so far of each choice that goes on


@dataclass(frozen=True)
class _Request:
    """The unfinished choices of a request, and the dp group that runs all: they share the prompt's KV."""

    group: Scheduler
    sequences: list[Sequence]


class Engine:
    """A loaded model that turns requests into tokens, one step at a time.

    With `grammars_ahead` the ranks prepare at start what all grammars need, so that no step waits for it later. With
    `recovers` ranks stay after the loss of one, for `recover`.
    Raises CheckpointError, ParallelLayoutError, ConfigError or ResourceError if `config` cannot run here; then no rank
    is left behind.
    """

    def __init__(
        self,
        config: EngineConfig,
        show_progress: bool = False,
        grammars_ahead: bool = False,
        recovers: bool = False,
    ) -> None:
        require_device(config)
        path = resolve_model(config.model, config.revision)
        self.model_path = path
        self.model_config = checked_model(config, path)
        of_ranks = pinned(config, path, self.model_config)
        self.config = config = replace(config, lora=of_ranks.lora, weights=of_ranks.weights)
        placements = initial_placements(config, self.model_config)
        self.tokenizer = Tokenizer.from_directory(path)
        self.chat_template = ChatTemplate.from_directory(path)
        eos = self.tokenizer.eos_token_ids if self.tokenizer else read_eos_token_ids(path)
        self._eos_token_ids = frozenset(
            token_id for token_id in eos if token_id < self.model_config.vocab_size
        )
        self._requests: dict[str, _Request] = {}
        self._next_seq_id = 0
        self._num_steps = 0
        self._grammars_ahead = grammars_ahead
        with loading_bar(show_progress) as progress:
            self._executor: Executor = make_executor(of_ranks, placements, progress)
        executor = self._executor
        executor.keeps_ranks = recovers
        try:
            traffic = StepTraffic(config, self.model_config, executor.device)
            self._meter = StepMeter(traffic, config.watchdog_s(executor.device))
            self._in_flight = StepsInFlight(executor, self._renew)
            callbacks = (self._unfinished, self._adopt, self._forget_cache)
            self.changes = RankChanges(executor, config, placements, *callbacks)
            self.experts, self.paces = self.changes.experts, RankPaces(executor)
            self.regrouping = Regrouping(executor, of_ranks, self.model_config, placements)
            self._use_ranks([SchedulerCounts() for _ in range(config.layout.dp)])
        except BaseException:
            self._executor.shutdown()
            raise
        if show_progress:
            print(f"{self.backends}; collectives: {self.collectives}", file=sys.stderr)

    def recover(self, cause: str, replaces: bool) -> Recovery:
        """Replaces the ranks that were lost, or goes on without them, and drops all requests; see `Regrouping`. Raises
        QwenDistError if that does not work; then only `shutdown` is left."""
        recovery, ranks = self.regrouping.recover(self.experts.settled, cause, replaces)
        layout = ranks.config.layout
        self.config = replace(self.config, layout=layout)
        self._requests.clear()
        self._in_flight.restart()
        self._meter.restart(StepTraffic(self.config, self.model_config, self._executor.device))
        self.paces.restart()
        self.changes.restart(ranks)
        self._use_ranks(counts_of_groups([group.counts for group in self._groups], layout.dp))
        return recovery

    def _use_ranks(self, counts: Iterable[SchedulerCounts]) -> None:
        """Creates the parts that depend on what the ranks can hold, for each dp group with its counts so far."""
        config, executor = self.config, self._executor
        self.backends, self.collectives, self.ranks = executor.backends, executor.collectives, executor.ranks
        self.grammars = BuiltGrammars(executor)
        num_blocks = executor.num_blocks
        self.max_model_len = max_model_len(config, self.model_config, num_blocks * config.block_size)
        limits = SchedulerLimits.of(config, executor.device, num_blocks, executor.may_repeat)
        blocks = num_blocks, config.block_size, config.prefix_caching
        self._groups = [
            Scheduler(BlockManager(*blocks), limits, self._eos_token_ids, each) for each in counts
        ]
        if self._grammars_ahead:
            executor.call("prepare_grammars", tuple(self._eos_token_ids))
        self._publish()

    @property
    def has_work(self) -> bool:
        """Whether steps run, or can be planned."""
        waits = self.changes.holds_steps or not any(group.has_work for group in self._groups)
        return bool(self._in_flight) or not waits

    def prepare(self, params: SamplingParams) -> SamplingSetup | None:
        """The sampling setup for `params`; None if ranks need none. May be called from any thread.

        Compiling a grammar for the first time may take seconds. Raises RequestError.
        """
        return make_setup(params, self.tokenizer, self._eos_token_ids, self.model_config.vocab_size)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        terms: RequestTerms = DEFAULT_TERMS,
        lora: str | None = None,
        setup: SamplingSetup | None = None,
        pooling: PoolingParams | None = None,
        resume: Resumed | None = None,
        on_begin: Callable[[], object] = lambda: None,
    ) -> list[TokenDelta]:
        """Queues a request on `terms`. `lora` names its adapter; `setup` is what `prepare` returned for `params`. A
        pooling request has `pooling` and the params `PROMPT_ONLY`.

        With `resume` the choices that it names go on after the output tokens that it has for them, as another engine
        would have gone on that had the same seed; other choices are not run. Returns the deltas, without tokens, of
        choices whose output is complete already. `on_begin` is called before the first step of each choice.

        Raises RequestError and changes nothing if the prompt cannot be run.
        """
        room = self.check(prompt_token_ids, params, lora, pooling, resume)
        assert request_id not in self._requests, f"request id {request_id!r} is taken"
        lora_number, salt = self.config.lora.number(lora), terms.salt(self.config.lora.digest(lora))
        seed = secrets.randbits(63) if params.seed is None else params.seed
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        sequences, ended = [], []
        for index in range(params.n) if resume is None else resume:
            sequence = Sequence(
                self._next_seq_id,
                request_id,
                index,
                list(prompt_token_ids),
                params,
                (seed + index + 2**63) % 2**64 - 2**63,  # 64 bits, with a sign
                max_tokens,
                terms.priority,
            )
            sequence.setup, sequence.pooling, sequence.client = setup, pooling, terms.client
            sequence.adapter, sequence.cache_salt, sequence.on_begin = lora_number, salt, on_begin
            sequence.suspect = terms.suspect
            self._next_seq_id += 1
            sequence.resume(resume[index] if resume else (), self._eos_token_ids)
            if sequence.finish_reason is None:
                sequences.append(sequence)
            else:
                ended.append(TokenDelta(index, (), (), sequence.finish_reason))
        if not sequences:
            return ended
        if not self.has_work:
            self._meter.work_came()
        groups = self._groups
        group = min(groups, key=lambda one: one.tokens_ahead(sequences[0])) if len(groups) > 1 else groups[0]
        for sequence in sequences:
            group.add(sequence)
        self._requests[request_id] = _Request(group, sequences)
        self._publish()
        return ended

    def check(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        lora: str | None = None,
        pooling: PoolingParams | None = None,
        resume: Resumed | None = None,
    ) -> int:
        """The number of tokens that can follow the prompt. Raises RequestError if the prompt is empty, too long or has
        ids outside the vocabulary, if `pooling` asks for too many dimensions, if there is no adapter `lora`, or if an
        output in `resume` cannot go on here."""
        self.config.lora.number(lora)
        config, context = self.model_config, self.max_model_len
        check_prompt(prompt_token_ids, params, pooling, config, context)
        for output in (resume or {}).values():
            check_output(output, prompt_token_ids, params, config, context, self._eos_token_ids)
        return context - len(prompt_token_ids)

    def abort(self, request_id: str, index: int | None = None) -> bool:
        """Ends a request, or its choice `index`, and frees its blocks. Returns False if it had ended already."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        ended = [s for s in request.sequences if index is None or s.index == index]
        for sequence in ended:
            request.group.finish(sequence, "abort")
            self._forget(sequence)
        self._publish()
        return bool(ended)

    def step(self) -> Outputs:
        """Plans steps until enough are in flight, then waits for the oldest one and returns its deltas."""
        self.changes.tick(idle=not self._in_flight)
        while (
            not self.changes.holds_steps
            and len(self._in_flight) < self._executor.depth
            and (plans := self._plan())
        ):
            self._meter.submitted(plans, alone=not self._in_flight)
            self._in_flight.submit(plans)
        outputs: Outputs = {}
        if self._in_flight:
            results = self._in_flight.collect(self._meter.limit_s)
            self._meter.collected(others=bool(self._in_flight))
            for group, (plan, result) in zip(self._groups, results, strict=True):
                if result is not None:
                    self._add_deltas(outputs, group.update(plan, result))
        self._publish()
        return outputs

    def _unfinished(self) -> Iterator[Sequence]:
        return (sequence for request in self._requests.values() for sequence in request.sequences)

    def _adopt(self, **changed: Any) -> None:
        self.config = replace(self.config, **changed)
        self.regrouping.adopt(**changed)

    def _forget_cache(self, keep_running: bool) -> None:
        for group in self._groups:
            group.forget_cache(keep_running)

    def _plan(self) -> list[StepPlan]:
        """Plans of the next step, one for each dp group; empty if there is nothing to do before the next result.

        If one group waits to draft tokens, all groups wait: they run their steps together.
        """
        if any(group.waits_to_draft for group in self._groups):
            return []
        planned = [group.schedule() for group in self._groups]
        if not any(planned):
            return []
        self._num_steps += 1
        return StepPlan.for_groups(self._num_steps, [plan.sequences if plan else () for plan in planned])

    @property
    def collected_steps(self) -> int:
        return self._meter.collected_steps

    def _renew(self, group: int, plan: StepPlan, renewed: set[int]) -> StepPlan:
        return self._groups[group].renew(plan, renewed)

    def check_health(self) -> None:
        """Raises EngineDeadError if a rank has been lost."""
        self._executor.check()

    def stats(self) -> EngineStats:
        """The statistics after the last step, `add_request` or `abort`. May be called from any thread."""
        return self._stats

    @property
    def step_age_s(self) -> float:
        """Seconds for which the oldest step in flight has run; 0 if none is. May be read from any thread."""
        return self._meter.step_age_s

    @property
    def in_long_step(self) -> bool:
        """See `StepMeter`."""
        return self._meter.in_long_step

    def stalled(self) -> str:
        """Why the step in flight seems to hang; "" if it does not. May be called from any thread."""
        return self._meter.stalled()

    def adapters_in_use(self) -> tuple[list[str], list[str]]:
        """Names of the adapters of running and of waiting sequences. May be called from any thread."""
        return adapters_in_use(self._groups, self.changes.adapters.names)

    def load(self) -> EngineLoad:
        """What waits and runs now. May be called from any thread."""
        return read_load(self._groups)

    def _publish(self) -> None:
        """Updates what `stats` returns."""
        self._stats = read_stats(self._groups, self._meter, self._num_steps, self._in_flight.num_repeated)

    def check_integrity(self) -> None:
        """Asserts that no KV block is lost or held twice."""
        for group in self._groups:
            group.blocks.check_integrity([*group.running, *group.waiting])

    def shutdown(self) -> None:
        """Ends the ranks. May be called more than once."""
        self._executor.shutdown()

    def _add_deltas(self, outputs: Outputs, advanced: Iterable[Advance]) -> None:
        for sequence, token_ids, logprobs in advanced:
            delta = sequence.delta(token_ids, logprobs, self._meter.collected_s)
            outputs.setdefault(sequence.request_id, []).append(delta)
            if sequence.finish_reason is not None:
                self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        request = self._requests[sequence.request_id]
        request.sequences.remove(sequence)
        if not request.sequences:
            del self._requests[sequence.request_id]
