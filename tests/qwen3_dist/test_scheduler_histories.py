"""The scheduler and its blocks through whole histories, with no device.

`FakeRanks` answers plans as real ranks would, from a memory of its own: it writes each token into the slot
the plan gives it, reads a sequence back through its block table, and makes the next token, and what is read of a
prompt, from all it read. A block shared, reused or evicted wrongly changes the tokens.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence as Items

from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_dist.engine.sequence import Sequence
from qwen3_dist.pooling_params import PoolingParams
from qwen3_dist.protocol.outputs import TokenLogprob
from qwen3_dist.protocol.step_plan import LAST_SAMPLED, PromptLogprobsSpec, PromptOutput, StepPlan, StepResult
from qwen3_dist.speculation import Speculation
from tests.scheduling import BLOCK, EOS, make_scheduler, make_sequence


def next_token(tokens: Items[int]) -> int:
    """Half of the time the token three back, so that some guesses are right; else EOS one time in eight."""
    number = hash(tuple(tokens))
    return tokens[-3] if number & 1 and len(tokens) > 2 else number // 2 % 8


def checksum(tokens: Items[int]) -> float:
    return float(hash(tuple(tokens)) % 2**20)


class FakeRanks:
    """Runs plans in order, as ranks do, and remembers what they wrote."""

    def __init__(self) -> None:
        self._memory: dict[tuple[int, int], int] = {}
        self._last: dict[int, int] = {}
        self._blocks: dict[int, list[int]] = {}  # by slot

    def run(self, plan: StepPlan) -> StepResult:
        for part in plan.sequences:
            blocks = self._blocks.setdefault(part.slot, [])
            assert part.first_block <= len(blocks)  # no rank has a gap
            if part.new_blocks:
                blocks[part.first_block :] = part.new_blocks
            tokens = [self._last[part.slot] if t == LAST_SAMPLED else t for t in part.token_ids]
            for position, token in enumerate(tokens, start=part.start):
                self._memory[blocks[position // BLOCK], position % BLOCK] = token
        sampled = []
        prompt_outputs: list[PromptOutput] = []
        for part in plan.sequences:
            end = part.start + len(part.token_ids)
            read = self.read(self._blocks[part.slot], end)
            if isinstance(part.prompt_request, PromptLogprobsSpec):
                ends = enumerate(
                    part.prompt_request.targets, start=part.start + part.prompt_request.first + 1
                )
                prompt_outputs.append(
                    tuple(TokenLogprob(target, checksum(read[:n]), ()) for n, target in ends)
                )
            elif part.prompt_request is not None:
                prompt_outputs.append(array("f", [checksum(read)]))
            if part.sample is not None:
                assert part.sample.position == end - part.num_drafted
                sampled += [next_token(read[: spec.position]) for spec in part.sample_specs]
                self._last[part.slot] = -2 if part.num_drafted else sampled[-1]
        return StepResult(
            plan.step, tuple(sampled), (None,) * len(sampled), prompt_outputs=tuple(prompt_outputs)
        )

    def spoil(self, plan: StepPlan) -> None:
        """Makes all that a step left behind wrong."""
        for part in plan.sequences:
            for position in range(part.start, part.start + len(part.token_ids)):
                self._memory[self._blocks[part.slot][position // BLOCK], position % BLOCK] = -3
            self._last[part.slot] = 6

    def read(self, block_table: Items[int], length: int) -> list[int]:
        """What lies in the first `length` places of a sequence."""
        return [self._memory[block_table[p // BLOCK], p % BLOCK] for p in range(length)]


def expected_output(prompt: Items[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


# Prompts are drawn from few tokens, so that many share prefixes.
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 2**20), st.integers(0, 10)),
        st.tuples(st.just("step"), st.just(0), st.just(0)),
        st.tuples(st.just("answer"), st.just(0), st.just(0)),
        st.tuples(st.just("abort"), st.integers(0, 30), st.just(0)),
    ),
    max_size=100,
)


def prompt_of(number: int) -> list[int]:
    length = number % 20 + 1
    return [1 + (number >> 5 >> (position // 3)) % 2 for position in range(length)]


def sequence_of(seq_id: int, number: int, max_tokens: int) -> Sequence:
    """One in four is scored, and half of those that generate nothing are pooled."""
    scored = {"prompt_logprobs": 0} if number % 4 == 0 else {}
    sequence = make_sequence(seq_id, prompt_of(number), max_tokens, number % 3 - 1, **scored)
    sequence.request_id = str(number % 7)  # some are of one request, and share its slots
    sequence.client = str(number % 3)
    if max_tokens == 0 and number % 2:
        sequence.pooling = PoolingParams()
    return sequence


def check_prompt_outputs(sequence: Sequence) -> None:
    """What was read of a prompt is what its tokens make, once each."""
    prompt = sequence.token_ids[: sequence.prompt_len]
    assert sequence.vector == (array("f", [checksum(prompt)]) if sequence.pooling else None)
    if sequence.params.prompt_logprobs is not None:
        scores = [TokenLogprob(prompt[n], checksum(prompt[:n]), ()) for n in range(1, len(prompt))]
        assert sequence.take_prompt_logprobs() == (None, *scores)


@settings(max_examples=400, deadline=None)
@given(
    actions=ACTIONS,
    blocks=st.integers(9, 20),
    tokens=st.integers(1, 24),
    seqs=st.integers(1, 6),
    ahead=st.integers(1, 3),
    caching=st.booleans(),
    stages=st.integers(1, 3),
    may_repeat=st.booleans(),
    speculation=st.none()
    | st.builds(Speculation, k=st.integers(1, 6), min=st.just(1), max=st.integers(1, 3)),
)
def test_no_history_changes_a_token_or_loses_a_block(
    actions: list[tuple[str, int, int]],
    blocks: int,
    tokens: int,
    seqs: int,
    ahead: int,
    caching: bool,
    stages: int,
    may_repeat: bool,
    speculation: Speculation | None,
) -> None:
    """Adds, steps planned up to `ahead` of their answers, preemptions, finishes and aborts in any order."""
    scheduler = make_scheduler(blocks, BLOCK, seqs, tokens, caching, stages, speculation, may_repeat)
    ranks = FakeRanks()
    added: list[Sequence] = []
    in_flight: deque[tuple[StepPlan, StepResult]] = deque()

    def step() -> None:
        if len(in_flight) < ahead and (plan := scheduler.schedule()) is not None:
            assert plan.num_tokens <= tokens and len(plan.sequences) <= seqs
            if stages > 1:  # a micro-batch waits for none before it
                assert not any(LAST_SAMPLED in part.token_ids for part in plan.sequences)
            assert len({part.slot for part in plan.sequences}) == len(plan.sequences)
            assert all(0 <= part.slot < seqs for part in plan.sequences)
            for part in plan.sequences:  # the last token is never computed, so no guess may stand there
                sequence = added[part.seq_id]
                assert part.start + len(part.token_ids) < sequence.prompt_len + max(1, sequence.max_tokens)
            in_flight.append((plan, ranks.run(plan)))
            for sequence in scheduler.running:  # what others may find holds known tokens, and no guess
                length = sequence.num_registered * BLOCK
                assert ranks.read(sequence.block_table, length) == sequence.token_ids[:length]

    for action, first, second in actions:
        if action == "add":
            sequence = sequence_of(len(added), first, second)
            added.append(sequence)
            scheduler.add(sequence)
        elif action == "abort" and first < len(added) and added[first].finish_reason is None:
            scheduler.finish(added[first], "abort")
        elif action == "step":
            step()
        elif action == "answer" and in_flight:
            scheduler.update(*in_flight.popleft())
        scheduler.blocks.check_integrity([*scheduler.running, *scheduler.waiting])
    while scheduler.has_work or in_flight:
        step()
        scheduler.update(*in_flight.popleft())
        scheduler.blocks.check_integrity([*scheduler.running, *scheduler.waiting])
    assert scheduler.blocks.num_free == blocks
    assert scheduler.counts.accepted_tokens <= scheduler.counts.drafted_tokens
    for sequence in added:
        output = expected_output(sequence.token_ids[: sequence.prompt_len], sequence.max_tokens)
        got = sequence.token_ids[sequence.prompt_len :]
        assert got == (output[: len(got)] if sequence.finish_reason == "abort" else output)
        if sequence.finish_reason != "abort":
            check_prompt_outputs(sequence)
