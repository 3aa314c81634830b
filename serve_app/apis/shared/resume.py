"""How far an answer got, so that another replica can go on with it: the tokens that the ingress has been told."""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

from qwen3_dist.protocol.outputs import TokenDelta

# What the engine gave for a choice in one step: the index of the choice in the request, the token ids, the engine's
# finish reason, the cached tokens of the prompt, and its scores if the rest of the answer has them again: the pickled
# log-probabilities of the tokens and of the prompt; b"" without any.
SentDelta = tuple[int, tuple[int, ...], str | None, int, bytes]
Sent = tuple[SentDelta, ...]


@dataclass
class SentChoice:
    """What there is of one choice; `sizes` has the number of tokens of each delta, which decides how the text was
    split into events, `scores` the scores of those deltas that have some, by their numbers."""

    num_cached_tokens: int
    token_ids: array[int] = field(default_factory=lambda: array("i"))
    sizes: bytearray = field(default_factory=bytearray)
    finish_reason: str | None = None
    scores: dict[int, bytes] = field(default_factory=dict)

    def deltas(self, index: int) -> Iterator[TokenDelta]:
        """Yields the engine's deltas again, for choice `index` of a prompt."""
        start = 0
        for number, size in enumerate(self.sizes):
            reason = self.finish_reason if number == len(self.sizes) - 1 else None
            token_ids = tuple(self.token_ids[start : start + size])
            logprobs, of_prompt = pickle.loads(self.scores[number]) if number in self.scores else ((), None)
            yield TokenDelta(index, token_ids, logprobs, reason, self.num_cached_tokens, of_prompt)
            start += size


@dataclass
class Resume:
    """What there is of an answer, by the index of the choice in the request. It grows with each part that a replica
    sends, and takes 5 bytes a token, and its scores; pickled, it goes to the replica that goes on.

    `model` tells the checkpoint that began the answer; another one refuses to go on.
    """

    model: str = ""
    choices: dict[int, SentChoice] = field(default_factory=dict)

    def add(self, sent: Sent) -> None:
        """Adds what a part of the answer covers, `Counted.sent`."""
        for index, token_ids, finish_reason, num_cached_tokens, scores in sent:
            choice = self.choices.get(index)
            if choice is None:
                choice = self.choices[index] = SentChoice(num_cached_tokens)
            if scores:
                choice.scores[len(choice.sizes)] = scores
            choice.token_ids.extend(token_ids)
            choice.sizes.append(len(token_ids))
            choice.finish_reason = finish_reason
