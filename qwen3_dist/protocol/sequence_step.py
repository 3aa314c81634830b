"""One sequence in a step, as plain data."""

from __future__ import annotations

from array import array
from typing import NamedTuple, TypeAlias

from qwen3_dist.pooling_params import PoolingParams
from qwen3_dist.protocol.outputs import TokenLogprob
from qwen3_dist.protocol.sampling_setup import SamplingSetup

LAST_SAMPLED = -1  # in place of a token id: the token last sampled for the sequence's slot


class SampleSpec(NamedTuple):
    """Sampling parameters of one token. `position` is the index of that token in its sequence.

    If the step verifies draft tokens, this is the spec of the first token sampled; the others have the positions that
    follow.
    """

    temperature: float
    top_p: float
    top_k: int
    seed: int
    position: int
    logprobs: int | None


class PromptLogprobsSpec(NamedTuple):
    """The prompt logprobs that a step must return. Row `first + i` of the sequence's tokens in the step predicts the
    token `targets[i]`; the logprob of that token is returned, and those of the `top` likeliest."""

    first: int
    targets: tuple[int, ...]
    top: int


# Prompt logprobs, one for each of the `targets`, or the fp32 vector of a pooling request.
PromptOutput: TypeAlias = "tuple[TokenLogprob, ...] | array[float]"


class SomeBlocks(NamedTuple):
    """The first `length` blocks of a sequence's table, which only grows at its end."""

    table: list[int]
    length: int


class SequenceStep(NamedTuple):
    """One sequence in a step: compute the KV of `token_ids`, the first of them at position `start`.

    `slot` is the index of the sequence's state on the ranks. `new_blocks` are the KV-cache blocks allocated since its
    last step or its admission; they follow the first `first_block` blocks of its table. `adapter` is the number of its
    LoRA adapter, from 1; 0 is none.

    `sample` is None if no token is sampled: the prompt is not complete yet, or nothing is to be generated. The last
    `num_drafted` tokens are draft tokens: 1 + num_drafted tokens are sampled, one to verify each draft token and one
    after the last. `setup` comes with the first step after each admission, if the sequence needs sampling state on the
    ranks. `prompt_request` asks for prompt logprobs or for the vector of a pooling request.

    `blocks` is the whole block table. It is not sent to ranks; the engine needs it to run a step again.
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
    prompt_request: PromptLogprobsSpec | PoolingParams | None = None
    blocks: SomeBlocks | None = None

    @property
    def sample_specs(self) -> list[SampleSpec]:
        """The spec of each token that the step samples, in order."""
        if self.sample is None:
            return []
        if not self.num_drafted:
            return [self.sample]
        return [
            self.sample._replace(position=self.sample.position + ahead)
            for ahead in range(1 + self.num_drafted)
        ]
