"""How far a stream got, so that another replica can go on with it: the tokens whose events its client has."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

from qwen3_dist.protocol.outputs import TokenDelta, TokenLogprob

# What the engine gave for a choice in one step: the index of the choice in the request, the token ids, the engine's
# finish reason, the cached tokens of the prompt, and the log-probabilities if the answer repeats them.
SentDelta = tuple[int, tuple[int, ...], str | None, int, tuple[TokenLogprob, ...]]
Sent = tuple[SentDelta, ...]


@dataclass
class SentChoice:
    """What the client has of one choice; `sizes` has the number of tokens of each delta, which decides how the text
    was split into events."""

    num_cached_tokens: int
    token_ids: array[int] = field(default_factory=lambda: array("i"))
    sizes: bytearray = field(default_factory=bytearray)
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def deltas(self, index: int) -> Iterator[TokenDelta]:
        """Yields the engine's deltas again, for choice `index` of a prompt."""
        start = 0
        for number, size in enumerate(self.sizes, start=1):
            part = slice(start, start + size)
            reason = self.finish_reason if number == len(self.sizes) else None
            token_ids, logprobs = tuple(self.token_ids[part]), tuple(self.logprobs[part])
            yield TokenDelta(index, token_ids, logprobs, reason, self.num_cached_tokens)
            start += size


@dataclass
class Resume:
    """What the client of a stream has, by the index of the choice in the request. It grows with each part that the
    client gets, and takes 5 bytes a token; pickled, it goes to the replica that goes on.

    `model` tells the checkpoint that began the stream; another one refuses to go on.
    """

    model: str = ""
    choices: dict[int, SentChoice] = field(default_factory=dict)

    def add(self, sent: Sent) -> None:
        """Adds what a part of the stream covers, `Counted.sent`."""
        for index, token_ids, finish_reason, num_cached_tokens, logprobs in sent:
            choice = self.choices.get(index)
            if choice is None:
                choice = self.choices[index] = SentChoice(num_cached_tokens)
            choice.token_ids.extend(token_ids)
            choice.sizes.append(len(token_ids))
            choice.finish_reason = finish_reason
            choice.logprobs += logprobs
