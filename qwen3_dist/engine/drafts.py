"""Guesses the next tokens of a sequence: what followed where it last read the same. Imports no torch."""

from __future__ import annotations

from qwen3_dist.speculation import Speculation

_WEIGHT = 0.2  # of the newest guess in the share of those that were right


class Drafter:
    """The places of one sequence's n-grams. Each token is indexed once, so a guess costs a few look-ups.

    Guesses are made silently too, so that their chance is known without the price of checking them.
    """

    def __init__(self, speculation: Speculation) -> None:
        self._most = speculation.k
        self._places: dict[int, dict[tuple[int, ...], int]] = {  # by length, the longest first
            length: {} for length in range(speculation.max, speculation.min - 1, -1)
        }
        self._num_indexed = 0  # tokens before which all n-grams are in `_places`
        self._chance = 0.5  # that a token is right which follows right ones
        self._guess: list[int] = []  # what should come after the first `_num_known` tokens
        self._num_known = 0

    def propose(self, token_ids: list[int], most: int, worth: float) -> list[int]:
        """Up to `most` tokens that may follow `token_ids`, which only grow from call to call.

        Each is right, with all before it, with a chance of at least `worth`, if guesses fare as the last ones did.
        """
        self._learn(token_ids)
        at = self._place_of_end(token_ids)
        follow = [] if at is None else token_ids[at : at + self._most]
        self._guess = [
            follow[i % len(follow)] for i in range(self._most if follow else 0)
        ]  # it repeats itself
        self._num_known = len(token_ids)
        count, chance = 0, self._chance
        while count < min(most, len(self._guess)) and chance >= worth:
            count, chance = count + 1, chance * self._chance
        return self._guess[:count]

    def _learn(self, token_ids: list[int]) -> None:
        """Compares the last guess with what came."""
        for guess, token_id in zip(self._guess, token_ids[self._num_known :], strict=False):
            self._chance += _WEIGHT * ((guess == token_id) - self._chance)
            if guess != token_id:
                break

    def _place_of_end(self, token_ids: list[int]) -> int | None:
        """Where the tokens begin that followed the latest earlier occurrence of the longest known end."""
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
