"""Guesses the next tokens of a sequence: what followed where it last read the same. Imports no torch."""

from __future__ import annotations

from qwen3_dist.speculation import Speculation


class Drafter:
    """The places of one sequence's n-grams. Each token is indexed once, so a guess costs a few look-ups.

    As many tokens are guessed as were right the last time, `k` once all were: where guesses fail, few are
    computed in vain, and a text that is copied is guessed `k` at a time.
    """

    def __init__(self, speculation: Speculation) -> None:
        self._most = self._next = speculation.k
        self._places: dict[int, dict[tuple[int, ...], int]] = {  # by length, the longest first
            length: {} for length in range(speculation.max, speculation.min - 1, -1)
        }
        self._num_indexed = 0  # tokens before which all n-grams are in `_places`

    def propose(self, token_ids: list[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `token_ids`, which only grow from call to call."""
        at = self._place_of_end(token_ids)
        if at is None:
            return []
        count = min(most, self._next)
        follow = token_ids[at : at + count]
        return [follow[index % len(follow)] for index in range(count)]  # over its end: it repeats itself

    def can_propose(self, token_ids: list[int]) -> bool:
        """Whether `propose` has a guess."""
        return self._place_of_end(token_ids) is not None

    def learn(self, num_drafted: int, num_accepted: int) -> None:
        """Takes in how many of the tokens guessed last were right."""
        self._next = self._most if num_accepted == num_drafted else max(1, num_accepted)

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
