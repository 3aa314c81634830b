"""Presence, frequency and repetition penalties, from token histories that stay on the device.

Only the tokens that a sequence has had are touched, however large the vocabulary.
Legend: P places, R rows of a step, H tokens of the longest history among them, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen3_dist.ops.transfer import on_device, rows_on_device
from qwen3_dist.protocol.sampling_setup import SamplingSetup

_LEAST_REPETITION = 1e-6  # below it a division would overflow


class Penalties:
    """The histories of the sequences that are penalised for them, each in a place of its own."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.device = device
        self._counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)  # [P, V] in the output
        self._prompted = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)  # [P, V] in the prompt
        self._history = torch.zeros(0, 0, dtype=torch.int64, device=device)  # [P, H], zeros at the end
        self._lengths: list[int] = []
        self._free: list[int] = []

    def open(self, prompt: Sequence[int], output: Sequence[int]) -> int:
        """A place for a sequence with these tokens."""
        if not self._free:
            self._free.append(len(self._lengths))
            self._lengths.append(0)
            self._reach(len(self._lengths), 0)
        place = self._free.pop()
        ids = on_device([*prompt, *output], torch.int64, self.device)
        self._lengths[place] = len(ids)
        self._reach(0, len(ids))
        self._history[place].zero_()
        self._history[place, : len(ids)] = ids
        self._counts[place].zero_()
        said = ids[len(prompt) :]
        self._counts[place].index_add_(0, said, torch.ones_like(said, dtype=torch.int32))
        self._prompted[place].zero_()
        self._prompted[place].index_fill_(0, ids[: len(prompt)], True)
        return place

    def close(self, place: int) -> None:
        self._free.append(place)

    def add(self, places: list[int], tokens: Tensor) -> None:
        """Adds the token that each place's sequence has got, without waiting for the device."""
        if not places:
            return
        lengths = [self._lengths[place] for place in places]
        self._reach(0, max(lengths) + 1)
        at, ends = rows_on_device((places, lengths), self.device)
        self._history[at, ends] = tokens
        self._counts[at, tokens] += 1
        for place in places:
            self._lengths[place] += 1

    def apply(
        self, logits: Tensor, rows: list[int], places: list[int], setups: Sequence[SamplingSetup]
    ) -> None:
        """Changes `rows` of logits [R, V]. Of a token twice in a history both change it to the same value."""
        row, at = rows_on_device((rows, places), self.device)
        row = row[:, None]
        ids = self._history[at, : max(self._lengths[place] for place in places)]
        counts = self._counts[at[:, None], ids]
        said = counts > 0
        seen = said | self._prompted[at[:, None], ids]
        repetition = self._column([max(setup.repetition_penalty, _LEAST_REPETITION) for setup in setups])
        values = logits[row, ids]
        values = torch.where(seen, torch.where(values > 0, values / repetition, values * repetition), values)
        values -= self._column([setup.frequency_penalty for setup in setups]) * counts
        values -= self._column([setup.presence_penalty for setup in setups]) * said
        logits[row, ids] = values

    def _column(self, values: list[float]) -> Tensor:
        return on_device(values, torch.float32, self.device)[:, None]

    def _reach(self, num_places: int, length: int) -> None:
        """Makes room for so many places and so long a history."""
        places, width = self._history.shape
        if num_places > places:
            more = max(num_places, 2 * places) - places
            self._counts = torch.cat([self._counts, self._counts.new_zeros(more, self._counts.shape[1])])
            self._prompted = torch.cat(
                [self._prompted, self._prompted.new_zeros(more, self._counts.shape[1])]
            )
            self._history = torch.cat([self._history, self._history.new_zeros(more, width)])
        if length > width:
            longer = max(length, 2 * width) - width
            self._history = torch.nn.functional.pad(self._history, (0, longer))
