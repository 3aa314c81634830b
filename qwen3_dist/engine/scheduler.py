"""The scheduler decides what each step computes. It imports no torch, so it can be tested and simulated alone.

A step has a token budget. Decoding sequences come first, with one token each; then unfinished prompts, each with as
large a chunk as the budget leaves; then waiting sequences are admitted while their whole prompt fits. If no KV block
is free, the scheduler preempts the lowest-priority sequence; its tokens, output included, are recomputed later.

Sequences are ordered by priority and arrival (`scheduling_key`). No sequence starves: a priority counts as fewer than
MAX_PRIORITY_STEPS steps of arrival, so a waiting sequence overtakes everything of its client that arrives later than
that. `slot_shares` keeps a request with many choices, and a client with many requests, from occupying all slots.

A step may be planned before the results of earlier steps are known (`num_pending` of a sequence). Under pipeline
parallelism these steps are the micro-batches: each takes a share of the decoding sequences that await no result.

With speculative decoding a sequence whose tokens are all known adds draft tokens, from what a step leaves of its
budget and of the free blocks. Draft tokens never delay or preempt another sequence.
"""

from __future__ import annotations

import heapq
import time
from bisect import insort
from typing import NamedTuple

from qwen3_dist.engine.block_manager import BlockManager
from qwen3_dist.engine.drafts import Drafter
from qwen3_dist.engine.request_queue import clear_suspect, scheduling_key, without_suspects
from qwen3_dist.engine.scheduler_counts import SchedulerCounts
from qwen3_dist.engine.sequence import Sequence
from qwen3_dist.engine.slot_shares import SlotShares
from qwen3_dist.protocol.outputs import TokenLogprob
from qwen3_dist.protocol.sequence_step import SomeBlocks
from qwen3_dist.protocol.step_limits import SchedulerLimits
from qwen3_dist.protocol.step_plan import LAST_SAMPLED, SampleSpec, SequenceStep, StepPlan, StepResult

# A step with draft tokens has at most this many times `free_tokens`; beyond that, hardly any draft token pays.
_MAX_DRAFT_STEP_FACTOR = 8
_KEPT_FREE = 100  # one block in so many stays free for running sequences when a new one is admitted


class Advance(NamedTuple):
    """What a step added to a sequence. `logprobs` has an item for each token, or none."""

    sequence: Sequence
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]


class Scheduler:
    """The waiting and running sequences of one dp group, both in scheduling order."""

    def __init__(
        self,
        blocks: BlockManager,
        limits: SchedulerLimits,
        eos_token_ids: frozenset[int],
        counts: SchedulerCounts | None = None,  # of a scheduler that this one follows
    ) -> None:
        self.blocks = blocks
        self.counts = counts or SchedulerCounts()
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._limits = limits
        self._eos_token_ids = eos_token_ids
        self._by_id: dict[int, Sequence] = {}
        self._slots = [*range(limits.max_num_seqs)]  # free ones; a heap, so that the lowest are used first
        self._shares = SlotShares()
        self._answered = self.counts.steps  # steps whose results were processed
        self._lacks_blocks = False  # whether a running sequence waits for blocks that cannot be freed yet

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def tokens_ahead(self, sequence: Sequence) -> int:
        """The load that a new `sequence` meets here: tokens of all other sequences minus its own cached prefix."""
        others = sum(s.num_tokens for s in self._by_id.values())
        return others - self.blocks.cached_tokens(sequence)

    def add(self, sequence: Sequence) -> None:
        needed = len(sequence.token_ids) + min(1, sequence.max_tokens)
        assert needed <= self.blocks.capacity_tokens, "the engine refuses what cannot fit"
        if self._limits.speculation is not None and sequence.params.is_plain and sequence.max_tokens:
            sequence.drafter = Drafter(self._limits.speculation)
        sequence.arrival = 0 if sequence.num_output else self.counts.steps  # what began elsewhere comes first
        insort(self.waiting, sequence, key=scheduling_key)
        self._shares.clients.add(sequence.client)
        self._by_id[sequence.seq_id] = sequence

    @property
    def waits_to_draft(self) -> bool:
        """Whether the next step should wait for results: draft tokens are in flight, or probable after the results."""
        if self._limits.speculation is None or self._limits.stages > 1:
            return False
        min_probability = self._min_draft_probability(len(self.running))
        return any(
            s.num_drafted or s.drafter.propose(s.token_ids, 1, min_probability)
            for s in self.running
            if s.num_pending and s.drafter is not None
        )

    def finish(self, sequence: Sequence, reason: str) -> None:
        """Removes `sequence`, waiting or running, and frees its blocks."""
        sequence.finish_reason = reason
        del self._by_id[sequence.seq_id]
        if sequence.is_running:
            self._stop(sequence)
        else:
            self.waiting.remove(sequence)

    def forget_cache(self, keep_running: bool) -> None:
        """Empties the prefix cache. Running sequences compute their KV anew unless they are to keep it. No step may be
        in flight."""
        while self.running and not keep_running:
            self._preempt(self.running[-1])
        self.blocks.forget_contents(self.running)

    def schedule(self) -> StepPlan | None:
        """Plans the next step and allocates its blocks; None if there is nothing to do before the next result."""
        self._share_slots()
        preemptions = self.counts.preemptions
        steps = [self._step(*chunk) for chunk in self._chunks_of_running().items()]
        if self.counts.preemptions == preemptions and not self._lacks_blocks:
            budget = self._limits.max_num_batched_tokens - sum(len(step.token_ids) for step in steps)
            steps += self._admit(budget)
        self._add_drafts(steps)
        if not steps:
            answers_due = self._answered < self.counts.steps
            assert answers_due or not self.has_work, "a sequence that fits alone can always be scheduled"
            return None
        self.counts.steps += 1
        self.counts.scheduled_sequences += len(steps)
        steps.sort(key=lambda step: len(step.token_ids) != 1)
        return StepPlan.for_groups(self.counts.steps, [tuple(steps)])[0]

    def update(self, plan: StepPlan, result: StepResult) -> list[Advance]:
        """Adds a step's results to its sequences and removes those that finish. Returns what each sequence got."""
        self._answered += 1
        self.blocks.settle(self._answered)
        advanced = []
        errors, prompt_outputs = dict(result.errors), iter(result.prompt_outputs)
        row = 0
        for step in plan.sequences:
            prompt_output = None if step.prompt_request is None else next(prompt_outputs)
            sequence = self._by_id.get(step.seq_id)  # None if it ended while the step ran
            if sequence is not None and prompt_output is not None:
                sequence.add_prompt_output(prompt_output)
            if step.sample is None:
                if sequence is not None and sequence.ends_without_token(step.start + len(step.token_ids)):
                    self.finish(sequence, "length")
                    advanced.append(Advance(sequence, (), ()))
                continue
            error = errors.get(row)
            rows, row = slice(row, row + 1 + step.num_drafted), row + 1 + step.num_drafted
            if sequence is None:
                continue
            kept = self._keep(sequence, step, result.token_ids[rows])
            self.counts.generation_tokens += len(kept)
            if error is not None:
                sequence.error, sequence.finish_reason = error, "error"
            logprobs = tuple(each for each in result.logprobs[rows][: len(kept)] if each is not None)
            advanced.append(Advance(sequence, kept, logprobs))
            self.blocks.register(sequence)
            if sequence.finish_reason is not None:
                self.finish(sequence, sequence.finish_reason)
        return advanced

    def renew(self, plan: StepPlan, renewed: set[int]) -> StepPlan:
        """Updates a planned step that must run again with what became known since it was planned.

        The first repeated step of a sequence (its id is not in `renewed` yet) carries everything that ranks may have
        lost: the whole block table, since another sequence may use the slot by now; the token that the step before
        sampled; and the sampling setup.
        """
        sequences = []
        for step in plan.sequences:
            if step.seq_id not in renewed:
                renewed.add(step.seq_id)
                assert step.blocks is not None
                table, length = step.blocks
                step = step._replace(first_block=0, new_blocks=tuple(table[:length]))
                sequence = self._by_id.get(step.seq_id)  # None if it ended; its result is ignored
                if sequence is not None:
                    known = sequence.token_ids[step.start : step.start + len(step.token_ids)]
                    tokens = (*known, *step.token_ids[len(known) :])
                    step = step._replace(token_ids=tokens, setup=sequence.current_setup)
            sequences.append(step)
        return plan._replace(sequences=tuple(sequences))

    def _keep(self, sequence: Sequence, step: SequenceStep, sampled: tuple[int, ...]) -> tuple[int, ...]:
        """Appends the accepted tokens: up to the first that differs from its draft, or that ends the sequence."""
        guesses = step.token_ids[len(step.token_ids) - step.num_drafted :]
        num_kept = 0
        for token_id, guess in zip(sampled, (*guesses, None), strict=True):
            sequence.append(token_id, self._eos_token_ids)
            num_kept += 1
            if token_id != guess or sequence.finish_reason is not None:
                break
        sequence.num_pending -= 1
        clear_suspect(sequence, (self.running, self.waiting))
        if guesses:
            self._settle_drafts(sequence, num_kept - 1)
        return sampled[:num_kept]

    def _chunks_of_running(self) -> dict[Sequence, int]:
        """The number of tokens that each running sequence computes in this step. Allocates their blocks."""
        chunks: dict[Sequence, int] = {}
        self._lacks_blocks = False
        budget = self._limits.max_num_batched_tokens
        ahead = self._limits.stages == 1  # steps of a pipeline must not wait for each other
        free = [s for s in self.running if not s.num_pending or (ahead and not s.num_drafted)]
        decodes = [s for s in free if s.num_uncomputed == 1][: -(-len(self.running) // self._limits.stages)]
        prefills = [s for s in free if s.num_uncomputed > 1]
        for sequence in (*decodes, *prefills):
            num_new = min(sequence.num_uncomputed, budget)
            while num_new > 0 and sequence.is_running:
                if self.blocks.reserve(sequence, num_new):
                    chunks[sequence] = num_new
                    budget -= num_new
                    break
                if self._reusable_after:  # the blocks of a preempted sequence could not be used either
                    self._lacks_blocks = True
                    break
                budget += chunks.pop(self._preempt(self.running[-1]), 0)
        return chunks

    def _add_drafts(self, steps: list[SequenceStep]) -> None:
        """Adds draft tokens to those sequences of a step whose tokens are all known."""
        if self._limits.speculation is None:
            return
        rows = sum(len(step.token_ids) for step in steps)
        most = min(self._limits.max_num_batched_tokens, _MAX_DRAFT_STEP_FACTOR * self._limits.free_tokens)
        for index, step in enumerate(steps):
            sequence = self._by_id[step.seq_id]
            if step.sample is None or sequence.num_pending > 1 or sequence.drafter is None:
                continue
            count = min(most - rows, sequence.max_tokens - sequence.num_output - 1)
            drafts = sequence.drafter.propose(sequence.token_ids, count, self._min_draft_probability(rows))
            if drafts and self.blocks.reserve(sequence, len(drafts)):
                sequence.num_drafted = len(drafts)
                rows += len(drafts)
                steps[index] = step._replace(
                    token_ids=(*step.token_ids, *drafts),
                    new_blocks=(*step.new_blocks, *sequence.take_new_blocks()[1]),
                    num_drafted=len(drafts),
                    blocks=SomeBlocks(sequence.block_table, len(sequence.block_table)),
                )

    def _min_draft_probability(self, rows: int) -> float:
        """The least acceptance probability at which a draft token pays in a step of `rows` tokens.

        One more token lengthens the step by a share of 1 / (rows + free_tokens); its probability must add at least
        that share to the tokens that the step yields, which are about `rows`.
        """
        return rows / (rows + self._limits.free_tokens)

    def _settle_drafts(self, sequence: Sequence, num_accepted: int) -> None:
        """Counts accepted draft tokens as computed. Later tokens overwrite the KV of rejected ones."""
        self.counts.drafted_tokens += sequence.num_drafted
        self.counts.accepted_tokens += num_accepted
        sequence.num_drafted = 0
        if sequence.is_running:  # else it was preempted while the step ran
            sequence.num_computed += num_accepted

    def _admit(self, budget: int) -> list[SequenceStep]:
        steps: list[SequenceStep] = []
        while self.waiting and budget > 0 and self._slots:
            place = self._shares.next(self.waiting)
            if self.waiting[place].suspect:
                if not (places := without_suspects(self.waiting, self.running)):
                    break
                place = places[self._shares.next([self.waiting[each] for each in places])]
            sequence = self.waiting[place]
            keep_free = self.blocks.num_blocks // _KEPT_FREE if self.running else 0
            if sequence.num_pending or not self.blocks.admit(sequence, keep_free):
                break
            insort(self.running, self.waiting.pop(place), key=scheduling_key)
            sequence.slot = heapq.heappop(self._slots)
            self._shares.add(sequence)
            self._count_prompt(sequence)
            num_new = min(sequence.num_uncomputed, budget)
            reserved = self.blocks.reserve(sequence, num_new)
            assert reserved, "a sequence is admitted only if all of it fits"
            steps.append(self._step(sequence, num_new))
            budget -= num_new
        return steps

    def _count_prompt(self, sequence: Sequence) -> None:
        if sequence.num_cached is None:
            sequence.num_cached = min(sequence.num_computed, sequence.prompt_len)
            sequence.scheduled_s = time.monotonic()
            sequence.on_begin()
            self.counts.prompt_tokens += sequence.prompt_len
            self.counts.cached_prompt_tokens += sequence.num_cached

    @property
    def _reusable_after(self) -> int:
        """The number of the step after which freed blocks may be reused, since steps may run again; 0: at once."""
        return self.counts.steps if self._limits.may_repeat and self._answered < self.counts.steps else 0

    def _share_slots(self) -> None:
        """If no slot is free for a request without one, preempts a sequence of a request with several."""
        may_share = self.waiting and not self._slots and not self._reusable_after
        if may_share and (victim := self._shares.owed(self.waiting, self.running)):
            self._preempt(victim)

    def _preempt(self, victim: Sequence) -> Sequence:
        self._stop(victim)
        insort(self.waiting, victim, key=scheduling_key)
        self.counts.preemptions += 1
        return victim

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.release(sequence, self._reusable_after)
        heapq.heappush(self._slots, sequence.slot)
        self._shares.remove(sequence)
        sequence.slot = -1
        sequence.is_set_up = False

    def _step(self, sequence: Sequence, num_new: int) -> SequenceStep:
        """Plans the next `num_new` tokens of a sequence and counts them as computed."""
        start, end = sequence.num_computed, sequence.num_computed + num_new
        tokens = sequence.token_ids[start:end]
        tokens += [LAST_SAMPLED] * (num_new - len(tokens))
        sample = None
        if end == sequence.num_tokens:
            if sequence.max_tokens:
                ask = sequence.params
                sample = SampleSpec(ask.temperature, ask.top_p, ask.top_k, sequence.seed, end, ask.logprobs)
            sequence.num_pending += 1
        prompt_request = sequence.next_prompt_request(start, end)
        sequence.num_computed = end
        self.blocks.register(sequence)
        first_block, new_blocks = sequence.take_new_blocks()
        setup = None if sequence.is_set_up else sequence.current_setup
        sequence.is_set_up = True
        return SequenceStep(
            sequence.seq_id,
            sequence.slot,
            tuple(tokens),
            start,
            new_blocks,
            sample,
            first_block,
            adapter=sequence.adapter,
            setup=setup,
            prompt_request=prompt_request,
            blocks=SomeBlocks(sequence.block_table, len(sequence.block_table)),
        )
