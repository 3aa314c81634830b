"""One sequence's part of a step, as plain data."""

from __future__ import annotations

from array import array
from typing import NamedTuple, TypeAlias

from qwen3_dist.pooling_params import PoolingParams
from qwen3_dist.protocol.outputs import TokenLogprob
from qwen3_dist.protocol.sampling_setup import SamplingSetup

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


class SomeBlocks(NamedTuple):
    """The first `length` blocks of a sequence's table, which only grows at its end."""

    table: list[int]
    length: int


class SequenceStep(NamedTuple):
    """One sequence's part of a step: compute `token_ids`, the first of them at position `start`.

    `slot` is the sequence's place among the running ones while it runs. `new_blocks` are the KV-cache blocks that it
    got since its last step, or since its admission; they follow the first `first_block` of its blocks. `sample` is
    None while a prompt is only partly computed, and where nothing is to be generated. `adapter` is the LoRA adapter
    that computes its tokens, counted from 1; 0 is none.
    The last `num_drafted` of the tokens are guesses: a token is drawn in front of each, and after all.
    `setup` comes with the first step after each admission of a sequence that is not plain.
    `reading` is what else is wanted of a prompt: its log-probabilities, or what follows from its last token.
    `blocks` are all of its blocks, new ones included. They stay with the engine, which needs them to repeat a step.
    """

    seq_id: int
    slot: int
    token_ids: tuple[int, ...]
    start: int
    new_blocks: tuple[int, ...]
    sample: SampleSpec | None
    first_block: int = 0
    num_drafted: int = 0
    adapter: int = 0
    setup: SamplingSetup | None = None
    reading: PromptScores | PoolingParams | None = None
    blocks: SomeBlocks | None = None

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
