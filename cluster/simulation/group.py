"""One dp group of a simulated replica: the engine's own scheduler, and a fast path for runs of equal steps.

As in `Engine.step`, steps are planned `depth` ahead: a cycle collects the tokens of the oldest step in flight and
plans one more. While every running sequence decodes and nothing else happens, `skip` executes many cycles at once,
with the same result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from cluster.planning.cost_model import StepShape
from cluster.simulation.arrivals import Request
from cluster.simulation.step_times import shape_of
from qwen3_dist.engine.block_manager import BlockManager
from qwen3_dist.engine.scheduler import Scheduler
from qwen3_dist.engine.sequence import Sequence
from qwen3_dist.protocol.step_limits import SchedulerLimits
from qwen3_dist.protocol.step_plan import SampleSpec, SequenceStep, StepPlan, StepResult
from qwen3_dist.sampling_params import SamplingParams

_GREEDY = SamplingParams(max_tokens=None, temperature=0, ignore_eos=True)
_TOKEN = 1  # the id of every token: block hashes, not token ids, tell prompts apart
_ONE_TOKEN = (_TOKEN,)
_SAMPLE = SampleSpec(0.0, 1.0, 0, 0, 0, None)


@dataclass(eq=False)
class SimulatedSequence(Sequence):
    """A sequence with its request and the times of its first and last token."""

    request: Request | None = None
    first_token_s: float | None = None
    last_token_s: float = 0.0


def make_sequence(seq_id: int, request: Request, block_size: int, longest: int) -> SimulatedSequence:
    """The sequence of `request`, cut to `longest` tokens.

    Its tokens have no content, so the hashes of all its blocks are set here: those inside the shared prefix follow
    from the prefix and the block's index, all others from the sequence and the index.
    """
    shared = request.prefix_len // block_size
    output_len = min(request.output_len, longest - request.input_len)
    total = (request.input_len + output_len) // block_size + 1
    own = seq_id << 33
    prefix = (request.prefix_id << 33) | (1 << 32)
    hashes = [*range(prefix, prefix + shared), *range(own + shared, own + total)]
    return SimulatedSequence(
        seq_id,
        str(seq_id),
        0,
        [_TOKEN] * request.input_len,
        _GREEDY,
        0,
        output_len,
        block_hashes=cast("list[bytes]", hashes),  # the block manager only compares them
        request=request,
    )


@dataclass(frozen=True)
class DecodeRun:
    """A run of equal decode steps in one group, from the oldest step in flight on."""

    num_decodes: int
    context_tokens: int  # of the oldest step; each later step has `num_decodes` more
    cycles: int  # number that can be skipped, since none finishes, admits or preempts a sequence


class Group:
    """A scheduler with its blocks, and the plans in flight; None is a step without work for this group."""

    def __init__(self, blocks: BlockManager, limits: SchedulerLimits, shortcuts: bool = True) -> None:
        self.scheduler = Scheduler(blocks, limits, frozenset())
        self._max_tokens = limits.max_num_batched_tokens
        self._shortcuts = shortcuts
        self._in_flight: deque[StepPlan | None] = deque()
        self._advanced = 0  # unfinished sequences that got a token in the last step
        self._preempted = False  # in the last planning

    @property
    def num_tokens(self) -> int:
        """Tokens of all its sequences."""
        return sum(len(sequence.token_ids) for sequence in self._sequences())

    def check_integrity(self) -> None:
        """Asserts that no block is lost or held twice."""
        self.scheduler.blocks.check_integrity(self._sequences())

    def plan(self) -> StepShape | None:
        """Plans one more step; None if this group has no work in it."""
        self._preempted = False
        if self._shortcuts and (decodes := self._plan_decodes()):
            return decodes
        counts = self.scheduler.counts
        before = counts.preemptions
        plan = self.scheduler.schedule()
        self._preempted = counts.preemptions != before
        self._in_flight.append(plan)
        return None if plan is None else shape_of(plan)

    def _plan_decodes(self) -> StepShape | None:
        """A fast `Scheduler.schedule` for the case that no sequence waits, all decode and blocks suffice: it leaves
        out what only ranks need. Otherwise changes nothing and returns None."""
        scheduler = self.scheduler
        blocks, size = scheduler.blocks, scheduler.blocks.block_size
        if scheduler.waiting:
            return None
        decoding, needed = [], 0
        for sequence in scheduler.running:
            uncomputed = sequence.num_uncomputed
            if uncomputed > 1:
                return None
            if uncomputed:
                decoding.append(sequence)
                needed += sequence.num_computed % size == 0
        if not decoding or len(decoding) > self._max_tokens or needed > blocks.num_free:
            return None
        steps, context = [], 0
        for sequence in decoding:
            start = sequence.num_computed
            if start % size == 0:
                blocks.reserve(sequence, 1)
            sequence.num_computed = start + 1
            sequence.num_pending += 1
            if (start + 1) // size > sequence.num_registered:
                blocks.register(sequence)
            context += start + 1
            steps.append(SequenceStep(sequence.seq_id, sequence.slot, _ONE_TOKEN, start, (), _SAMPLE))
        scheduler.counts.steps += 1
        scheduler.counts.scheduled_sequences += len(steps)
        self._in_flight.append(StepPlan.for_groups(scheduler.counts.steps, [tuple(steps)])[0])
        return StepShape(len(steps), context, 0, 0, len(steps))

    def cancel_plan(self) -> None:
        """Removes the last planned step, in which no group has work."""
        plan = self._in_flight.pop()
        assert plan is None

    def collect(self) -> list[SimulatedSequence]:
        """Ends the oldest step in flight; returns the sequences that got a token."""
        plan = self._in_flight.popleft()
        self._advanced = 0
        if plan is None:
            return []
        samples = sum(step.sample is not None for step in plan.sequences)
        result = StepResult(plan.step, (_TOKEN,) * samples, ())
        advanced = [advance.sequence for advance in self.scheduler.update(plan, result)]
        self._advanced = sum(sequence.finish_reason is None for sequence in advanced)
        return cast("list[SimulatedSequence]", advanced)

    def decode_run(self) -> DecodeRun | None:
        """The run of equal steps that starts now; None if the next cycle may differ from the last.

        In such a run every running sequence got a token in the last step and decodes in all steps in flight. Waiting
        sequences cannot be admitted, since free blocks only decrease and slots stay taken until a sequence finishes.
        """
        running, waiting = self.scheduler.running, self.scheduler.waiting
        if not running:
            idle = not waiting and not any(self._in_flight)
            return DecodeRun(0, 0, _UNBOUNDED) if idle else None
        if self._preempted or self._advanced != len(running) or (waiting and waiting[0].num_pending):
            return None
        newest = self._in_flight[-1]
        if newest is None or len(newest.sequences) != len(running):
            return None
        ids = _decoding_ids(newest)
        if ids is None or any(plan is None or _decoding_ids(plan) != ids for plan in self._in_flight):
            return None
        left = min(s.max_tokens - (len(s.token_ids) - s.prompt_len) for s in running) - len(self._in_flight)
        context = sum(len(s.token_ids) for s in running)  # the oldest step computes the last known tokens
        return DecodeRun(len(running), context, self._cycles_that_fit(left))

    def skip(self, cycles: int, now_s: float) -> None:
        """Executes `cycles` cycles of the current run, the last of which ends at `now_s`."""
        scheduler = self.scheduler
        blocks, running = scheduler.blocks, scheduler.running
        tokens = [_TOKEN] * cycles
        for sequence in cast("list[SimulatedSequence]", running):
            reserved = blocks.reserve(sequence, cycles)
            assert reserved, "a run ends before blocks run out"
            sequence.num_computed += cycles
            sequence.token_ids += tokens
            sequence.last_token_s = now_s
            blocks.register(sequence)
        if running:
            scheduler.counts.steps += cycles
            scheduler.counts.scheduled_sequences += cycles * len(running)
            scheduler.counts.generation_tokens += cycles * len(running)

    def _cycles_that_fit(self, cycles: int) -> int:
        """`cycles`, or fewer if there are not enough free blocks for all running sequences."""
        blocks = self.scheduler.blocks
        size, free = blocks.block_size, blocks.num_free
        while cycles > 0:
            needed = sum(
                -(-(s.num_computed + cycles) // size) - len(s.block_table) for s in self.scheduler.running
            )
            if needed <= free:
                break
            cycles = min(cycles - 1, cycles // 2)
        return max(cycles, 0)

    def _sequences(self) -> Iterator[Sequence]:
        yield from self.scheduler.running
        yield from self.scheduler.waiting


_UNBOUNDED = 1 << 30


def _decoding_ids(plan: StepPlan) -> list[int] | None:
    """Ids of the sequences of a step that only decodes; None for other steps."""
    ids = []
    for step in plan.sequences:
        if step.sample is None or len(step.token_ids) != 1:
            return None
        ids.append(step.seq_id)
    return ids
