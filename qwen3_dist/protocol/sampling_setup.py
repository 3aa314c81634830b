"""Sampling parameters of a sequence that needs more than temperature, top-k and top-p. Plain data, no torch.

Ranks get a sequence's setup with its first step after each admission and keep it while the sequence runs.
"""

from __future__ import annotations

from typing import NamedTuple


class Thinking(NamedTuple):
    """The tokens that delimit reasoning: `opens` is <think>, `closes` is </think>.

    `breaks` has the tokens that are one or two line breaks, each with that number; the chat template writes two line
    breaks after </think>.
    """

    opens: int
    closes: int
    breaks: tuple[tuple[int, int], ...]


class SamplingSetup(NamedTuple):
    """`SamplingParams` with token ids for texts. `prompt` and `output` are the sequence's tokens at its admission.

    `stop_token_ids` include EOS unless it is ignored. `reasoning` is "none" if `thinking` is None.
    """

    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    min_tokens: int
    stop_token_ids: tuple[int, ...]
    eos_token_ids: tuple[int, ...]
    bad_words: tuple[tuple[int, ...], ...]
    logprob_token_ids: tuple[int, ...]
    thinking: Thinking | None
    reasoning: str
    thinking_token_budget: int | None
    grammar: str | None
    prompt: tuple[int, ...] = ()
    output: tuple[int, ...] = ()

    @property
    def penalises(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1
