"""What the scheduler tells the ranks to do in one step, and what they answer. Plain data: no torch.

A plan carries what is new. Ranks keep two things of each running sequence, by its slot: the blocks that hold its keys
and values, and the token last sampled for it, which is the one to compute where a step is planned before the step
before it has answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from qwen3_dist.protocol.outputs import TokenLogprob
from qwen3_dist.protocol.plan_columns import SequenceColumns
from qwen3_dist.protocol.sequence_step import LAST_SAMPLED, PromptScores, Reading, SampleSpec, SequenceStep

__all__ = [
    "LAST_SAMPLED",
    "PromptScores",
    "Reading",
    "SampleSpec",
    "SequenceStep",
    "StepPlan",
    "StepResult",
]

_FEW_SEQUENCES = 8  # that pickle faster as they are than in columns


class StepPlan(NamedTuple):
    """One step of one dp group; sequences with a single token come first.

    A group without sequences takes part where the others need it: `group_tokens` are the tokens of every
    group in this step, by which ranks of all groups size and choose the exchanges that they share;
    `decodes_only` says that after every token of every group one is drawn: there are decodes alone, and guesses;
    `adapted` that some sequence of some group has an adapter; `exact` that tokens must reach their experts by a way
    that has no capacity, since one that has was too small for this step.
    """

    step: int
    sequences: tuple[SequenceStep, ...]
    group_tokens: tuple[int, ...]
    decodes_only: bool
    adapted: bool = False
    exact: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        step, sequences, *others = self
        if len(sequences) <= _FEW_SEQUENCES:
            return StepPlan, (step, tuple(each._replace(blocks=None) for each in sequences), *others)
        return _from_columns, (step, SequenceColumns.of(sequences), *others)

    @classmethod
    def for_groups(cls, step: int, parts: Sequence[tuple[SequenceStep, ...]]) -> list[StepPlan]:
        """The plans of one step of several dp groups."""
        tokens = tuple(sum(len(sequence.token_ids) for sequence in sequences) for sequences in parts)
        decodes_only = all(
            len(sequence.token_ids) == 1 + sequence.num_drafted and sequence.sample is not None
            for sequences in parts
            for sequence in sequences
        )
        adapted = any(sequence.adapter for sequences in parts for sequence in sequences)
        return [cls(step, sequences, tokens, decodes_only, adapted) for sequences in parts]

    def in_single_tokens(self) -> StepPlan:
        """A step of decodes alone with every guess as a decode of its own, which finds the ones before it in
        their common blocks."""
        if not any(sequence.num_drafted for sequence in self.sequences):
            return self
        singles = tuple(
            sequence._replace(token_ids=(token_id,), start=sequence.start + ahead, sample=spec, num_drafted=0)
            for sequence in self.sequences
            for ahead, (token_id, spec) in enumerate(zip(sequence.token_ids, sequence.draws, strict=True))
        )
        return self._replace(sequences=singles)

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence.token_ids) for sequence in self.sequences)


class StepResult(NamedTuple):
    """The sampled tokens, 1 + `num_drafted` of every sequence of the plan that has a `sample`, in its order.

    Of a sequence's tokens the first is its next one, and another one counts while the guess in front of it
    equals the one before. `errors` say of a row why its sequence cannot go on. `readings` are those of every
    sequence that has a `reading`, in the plan's order. `overflowed`: more tokens went to an expert than its exchange
    had room for, so that the result is void and the step must be run again, `exact`.
    """

    step: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob | None, ...]
    errors: tuple[tuple[int, str], ...] = ()
    readings: tuple[Reading, ...] = ()
    overflowed: bool = False


def _from_columns(step: int, columns: SequenceColumns, *others: Any) -> StepPlan:
    return StepPlan(step, columns.sequences(), *others)
