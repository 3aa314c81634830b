"""Sampling state of a sequence that needs more than temperature, top-k and top-p.

Plain data, no torch. Ranks get it with the first step after each admission; later steps carry nothing.
"""

from __future__ import annotations

from typing import NamedTuple


class Thinking(NamedTuple):
    """The tokens that delimit reasoning: `opens` (<think>) and `closes` (</think>).

    `breaks` are the tokens of one and two line breaks, with that number: the template puts two after `closes`.
    """

    opens: int
    closes: int
    breaks: tuple[tuple[int, int], ...]


class SamplingSetup(NamedTuple):
    """`SamplingParams` as token ids. `prompt` and `output` are the sequence's tokens at its admission.

    Tokens of `ending` end the sequence. `reasoning` is "none" if there is no `thinking`.
    """

    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    min_tokens: int
    ending: tuple[int, ...]
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
