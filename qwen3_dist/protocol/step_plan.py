"""The plan of one step, which the engine sends to the ranks, and its result. Plain data, no torch.

A plan holds only what is new since the last one. Ranks keep, by slot, the block table of each running sequence and the
token last sampled for it. A step that is planned before that token is known has LAST_SAMPLED in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from qwen3_dist.protocol.outputs import TokenLogprob
from qwen3_dist.protocol.plan_columns import SequenceColumns
from qwen3_dist.protocol.sequence_step import (
    LAST_SAMPLED,
    PromptLogprobsSpec,
    PromptOutput,
    SampleSpec,
    SequenceStep,
)

__all__ = [
    "LAST_SAMPLED",
    "PromptLogprobsSpec",
    "PromptOutput",
    "SampleSpec",
    "SequenceStep",
    "StepPlan",
    "StepResult",
]

_FEW_SEQUENCES = 8  # up to this number, sequences pickle faster as they are than as columns


class StepPlan(NamedTuple):
    """One step of one dp group. Sequences with one token come first.

    A group without sequences still takes part in the collectives of MoE layers. `group_tokens` is the number of tokens
    of every group, from which all ranks choose the same dispatcher and sizes. `decodes_only`: in all groups a token is
    sampled after every token of the step (decodes and draft tokens, no prompts). `adapted`: a sequence of some group
    has a LoRA adapter. `exact`: dispatch without a capacity, since an all-to-all of fixed capacity overflowed.
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
        """The plans of one step, one for each dp group, from the sequences of each."""
        tokens = tuple(sum(len(sequence.token_ids) for sequence in sequences) for sequences in parts)
        decodes_only = all(
            len(sequence.token_ids) == 1 + sequence.num_drafted and sequence.sample is not None
            for sequences in parts
            for sequence in sequences
        )
        adapted = any(sequence.adapter for sequences in parts for sequence in sequences)
        return [cls(step, sequences, tokens, decodes_only, adapted) for sequences in parts]

    def in_single_tokens(self) -> StepPlan:
        """This plan, of decodes only, with each draft token as a sequence of one token. Such sequences share a slot
        and its blocks, so each attends to those before it."""
        if not any(sequence.num_drafted for sequence in self.sequences):
            return self
        singles = tuple(
            sequence._replace(token_ids=(token_id,), start=sequence.start + ahead, sample=spec, num_drafted=0)
            for sequence in self.sequences
            for ahead, (token_id, spec) in enumerate(
                zip(sequence.token_ids, sequence.sample_specs, strict=True)
            )
        )
        return self._replace(sequences=singles)

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence.token_ids) for sequence in self.sequences)


class StepResult(NamedTuple):
    """The sampled tokens: 1 + num_drafted for every sequence of the plan with a `sample`, in the plan's order.

    The first token of a sequence is its next one; the token after a draft token counts only if all draft tokens up to
    there equal the tokens sampled for them. `errors` are pairs of a row of `token_ids` and the reason why its sequence
    must end. `prompt_outputs` has one item for every sequence with a `prompt_request`, in the plan's order.
    `overflowed`: an all-to-all of fixed capacity overflowed, so the result is void and the step must run again,
    `exact`.
    """

    step: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob | None, ...]
    errors: tuple[tuple[int, str], ...] = ()
    prompt_outputs: tuple[PromptOutput, ...] = ()
    overflowed: bool = False


def _from_columns(step: int, columns: SequenceColumns, *others: Any) -> StepPlan:
    return StepPlan(step, columns.sequences(), *others)
