"""Decides what each step computes. Imports no torch, so it can be tested and simulated alone.

A step has a token budget. Running sequences come first, in order of arrival: a decode takes one token,
an unfinished prompt as large a chunk as the budget leaves. Then waiting ones are admitted while blocks
and budget last. A running sequence that finds no free block preempts the latest arrival, which gives
its blocks back and is computed again later (its output so far included).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from qwen3_dist.engine.block_manager import BlockManager
from qwen3_dist.engine.plan import SampleSpec, SequenceStep, StepPlan, StepResult
from qwen3_dist.engine.sequence import Sequence


@dataclass(frozen=True)
class SchedulerLimits:
    """Most sequences and tokens of one step."""

    max_num_seqs: int
    max_num_batched_tokens: int


class Scheduler:
    """Waiting and running sequences of one dp group."""

    def __init__(self, blocks: BlockManager, limits: SchedulerLimits, eos_token_ids: frozenset[int]) -> None:
        self.blocks = blocks
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_steps = 0
        self.num_preemptions = 0
        self._limits = limits
        self._eos_token_ids = eos_token_ids
        self._by_id: dict[int, Sequence] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        assert len(sequence.token_ids) < self.blocks.capacity_tokens, "the engine refuses what cannot fit"
        self.waiting.append(sequence)
        self._by_id[sequence.seq_id] = sequence

    def finish(self, sequence: Sequence, reason: str) -> None:
        """Takes `sequence` out, wherever it is, and frees its blocks."""
        sequence.finish_reason = reason
        self.blocks.release(sequence)
        self._by_id.pop(sequence.seq_id, None)
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self) -> StepPlan | None:
        """The next step, with its blocks reserved; None when there is nothing to do."""
        budget = self._limits.max_num_batched_tokens
        chunks: list[tuple[Sequence, int]] = []
        preempted = False
        position = 0
        while position < len(self.running) and budget > 0:
            sequence = self.running[position]
            num_new = min(sequence.num_uncomputed, budget)
            while not self.blocks.reserve(sequence, num_new):
                preempted = True
                if self._preempt_latest() is sequence:
                    break
            else:
                chunks.append((sequence, num_new))
                budget -= num_new
                position += 1
        while self.waiting and budget > 0 and not preempted and len(self.running) < self._limits.max_num_seqs:
            sequence = self.waiting[0]
            num_new = min(sequence.num_uncomputed, budget)
            if not self.blocks.reserve(sequence, num_new):
                break
            self.running.append(self.waiting.popleft())
            chunks.append((sequence, num_new))
            budget -= num_new
        if not chunks:
            assert not self.has_work, "a sequence that fits alone can always be scheduled"
            return None
        self.num_steps += 1
        chunks.sort(key=lambda chunk: chunk[1] != 1)
        return StepPlan(self.num_steps, tuple(self._step(sequence, num_new) for sequence, num_new in chunks))

    def update(self, plan: StepPlan, result: StepResult) -> list[Sequence]:
        """Takes a step's tokens in; returns the sequences that got one, finished ones taken out."""
        sampled = iter(result.token_ids)
        advanced = []
        for step in plan.sequences:
            token_id = next(sampled) if step.sample is not None else None
            sequence = self._by_id.get(step.seq_id)
            if sequence is None:
                continue  # aborted while the step ran
            sequence.num_computed += len(step.token_ids)
            if token_id is not None:
                sequence.append(token_id, self._eos_token_ids)
                advanced.append(sequence)
                if sequence.finish_reason is not None:
                    self.finish(sequence, sequence.finish_reason)
        return advanced

    def _preempt_latest(self) -> Sequence:
        victim = self.running.pop()
        self.blocks.release(victim)
        self.waiting.appendleft(victim)
        self.num_preemptions += 1
        return victim

    def _step(self, sequence: Sequence, num_new: int) -> SequenceStep:
        start = sequence.num_computed
        sample = None
        if start + num_new == len(sequence.token_ids):
            params = sequence.params
            position = len(sequence.token_ids)
            sample = SampleSpec(
                params.temperature, params.top_p, params.top_k, sequence.seed, position, params.logprobs
            )
        tokens = tuple(sequence.token_ids[start : start + num_new])
        return SequenceStep(sequence.seq_id, tokens, start, tuple(sequence.block_table), sample)
