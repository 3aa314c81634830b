"""What the scheduler tells the ranks to do in one step, and what they answer. Plain data: no torch.

A plan says everything a rank needs but one thing: where a step is planned before the one before it has
answered, the token to compute is the one sampled there, which the ranks have kept. Named tuples, since
one is pickled every step and they pickle several times faster than dataclasses.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from qwen3_dist.engine.outputs import TokenLogprob
from qwen3_dist.engine.sampling_setup import SamplingSetup
from qwen3_dist.pooling_params import PoolingParams

LAST_SAMPLED = -1  # in place of a token id: the token last sampled for the sequence's slot


class SampleSpec(NamedTuple):
    """How to draw one token. `position` is the index it will have in its sequence.

    Tokens drawn after guesses in the same step have the positions that follow.
    """

    temperature: float
    top_p: float
    top_k: int
    seed: int
    position: int
    logprobs: int | None


class PromptScores(NamedTuple):
    """Log-probabilities that a step is to give of a prompt: in each of its rows from `first` on that of the token
    that follows (`targets`), and the `top` likeliest."""

    first: int
    targets: tuple[int, ...]
    top: int


Reading: TypeAlias = "tuple[TokenLogprob, ...] | array[float]"  # of each target, or a vector in fp32


class SequenceStep(NamedTuple):
    """One sequence's part of a step: compute `token_ids`, the first of them at position `start`.

    `block_table` covers the sequence up to the last of them. `sample` is None while a prompt is only
    partly computed, and where nothing is to be generated. `slot` is the sequence's place among the running
    ones, its own while it runs. `adapter` is the one that its tokens are computed with, counted from 1; 0 is none.
    The last `num_drafted` of the tokens are guesses: a token is drawn in front of each, and after all.
    `setup` comes with the first step after each admission of a sequence that is not plain.
    `reading` is what else is wanted of a prompt: its log-probabilities, or what follows from its last token.
    """

    seq_id: int
    slot: int
    token_ids: tuple[int, ...]
    start: int
    block_table: tuple[int, ...]
    sample: SampleSpec | None
    num_drafted: int = 0
    adapter: int = 0
    setup: SamplingSetup | None = None
    reading: PromptScores | PoolingParams | None = None

    @property
    def draws(self) -> list[SampleSpec]:
        """How to draw each of its tokens, in order."""
        if self.sample is None:
            return []
        if not self.num_drafted:
            return [self.sample]
        return [
            self.sample._replace(position=self.sample.position + ahead)
            for ahead in range(1 + self.num_drafted)
        ]

    @property
    def num_read(self) -> int:
        """Of how many of its tokens, the last ones, anything reads what the model makes of them."""
        if isinstance(self.reading, PromptScores):
            return len(self.token_ids)
        return 1 + self.num_drafted if self.sample is not None or self.reading is not None else 0


class StepPlan(NamedTuple):
    """One step of one dp group; sequences with a single token come first.

    A group without sequences takes part where the others need it: `group_tokens` are the tokens of every
    group in this step, by which ranks of all groups size and choose the exchanges that they share, and
    `group_read` those of them that are read;
    `decodes_only` says that after every token of every group one is drawn: there are decodes alone, and guesses;
    `adapted` that some sequence of some group has an adapter.
    """

    step: int
    sequences: tuple[SequenceStep, ...]
    group_tokens: tuple[int, ...]
    decodes_only: bool
    adapted: bool = False
    group_read: tuple[int, ...] = ()

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
        read = tuple(sum(sequence.num_read for sequence in sequences) for sequences in parts)
        return [cls(step, sequences, tokens, decodes_only, adapted, read) for sequences in parts]

    @property
    def as_read(self) -> StepPlan:
        """The step of those tokens alone that are read."""
        sequences = (
            each._replace(
                token_ids=each.token_ids[-each.num_read :],
                start=each.start + len(each.token_ids) - each.num_read,
            )
            for each in self.sequences
            if each.num_read
        )
        return self._replace(sequences=tuple(sequences), group_tokens=self.group_read)

    def in_single_tokens(self) -> StepPlan:
        """A step of decodes alone with every guess as a decode of its own, which finds the ones before it in
        their common blocks."""
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
    sequence that has a `reading`, in the plan's order.
    """

    step: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob | None, ...]
    errors: tuple[tuple[int, str], ...] = ()
    readings: tuple[Reading, ...] = ()
