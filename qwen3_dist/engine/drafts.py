"""Prompt-lookup drafts: the tokens that followed the last earlier occurrence of an n-gram. Imports no torch."""

from __future__ import annotations

from qwen3_dist.speculation import Speculation

_WEIGHT = 0.2  # of the newest draft token in the moving average of the acceptance rate


class Drafter:
    """Drafts for one sequence. Each token is indexed once, so a draft costs a few look-ups.

    Drafts that are not verified are compared with the sampled tokens too, so the acceptance rate is known for free.
    """

    def __init__(self, speculation: Speculation) -> None:
        self._most = speculation.k
        self._places: dict[
            int, dict[tuple[int, ...], int]
        ] = {  # position after each n-gram, by n, longest first
            length: {} for length in range(speculation.max, speculation.min - 1, -1)
        }
        self._num_indexed = 0  # leading tokens whose n-grams are indexed
        self._chance = 0.5  # that a draft token is right if those before it are
        self._guess: list[int] = []  # the draft for the positions after `_num_known`
        self._num_known = 0

    def propose(self, token_ids: list[int], most: int, min_probability: float) -> list[int]:
        """Up to `most` draft tokens to follow `token_ids`, which only grow from call to call.

        By the acceptance rate so far, each is accepted with a probability of at least `min_probability`.
        """
        self._learn(token_ids)
        at = self._place_of_end(token_ids)
        follow = [] if at is None else token_ids[at : at + self._most]
        self._guess = [
            follow[i % len(follow)] for i in range(self._most if follow else 0)
        ]  # a short match repeats
        self._num_known = len(token_ids)
        count, chance = 0, self._chance
        while count < min(most, len(self._guess)) and chance >= min_probability:
            count, chance = count + 1, chance * self._chance
        return self._guess[:count]

    def _learn(self, token_ids: list[int]) -> None:
        """Compares the last draft with the tokens that were sampled."""
        for guess, token_id in zip(self._guess, token_ids[self._num_known :], strict=False):
            self._chance += _WEIGHT * ((guess == token_id) - self._chance)
            if guess != token_id:
                break

    def _place_of_end(self, token_ids: list[int]) -> int | None:
        """The position after the latest earlier occurrence of the longest n-gram at the end, or None."""
        self._index(token_ids)
        for length, places in self._places.items():
            at = places.get(tuple(token_ids[-length:]))
            if at is not None:
                return at
        return None

    def _index(self, token_ids: list[int]) -> None:
        for length, places in self._places.items():
            for end in range(max(length, self._num_indexed), len(token_ids)):
                places[tuple(token_ids[end - length : end])] = end
        self._num_indexed = len(token_ids)
