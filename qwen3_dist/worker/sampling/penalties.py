"""Presence, frequency and repetition penalties, from token histories that stay on the device.

Only logits of tokens in a sequence's history are changed, so the cost does not grow with the vocabulary.
Legend: P slots for histories, R rows of a step, H tokens of the longest history, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen3_dist.ops.transfer import on_device, rows_on_device
from qwen3_dist.protocol.sampling_setup import SamplingSetup

_LEAST_REPETITION = 1e-6  # below it a division would overflow


class Penalties:
    """The token histories of sequences with penalties, one slot for each sequence."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.device = device
        self._counts = torch.zeros(
            0, vocab_size, dtype=torch.int32, device=device
        )  # [P, V] occurrences in the output
        self._in_prompt = torch.zeros(
            0, vocab_size, dtype=torch.bool, device=device
        )  # [P, V] if in the prompt
        self._history = torch.zeros(
            0, 0, dtype=torch.int64, device=device
        )  # [P, H] token ids, padded with zeros
        self._lengths: list[int] = []
        self._free: list[int] = []

    def open(self, prompt: Sequence[int], output: Sequence[int]) -> int:
        """Stores the history of a new sequence. Returns its slot."""
        if not self._free:
            self._free.append(len(self._lengths))
            self._lengths.append(0)
            self._grow(len(self._lengths), 0)
        slot = self._free.pop()
        ids = on_device([*prompt, *output], torch.int64, self.device)
        self._lengths[slot] = len(ids)
        self._grow(0, len(ids))
        self._history[slot].zero_()
        self._history[slot, : len(ids)] = ids
        self._counts[slot].zero_()
        is_output = ids[len(prompt) :]
        self._counts[slot].index_add_(0, is_output, torch.ones_like(is_output, dtype=torch.int32))
        self._in_prompt[slot].zero_()
        self._in_prompt[slot].index_fill_(0, ids[: len(prompt)], True)
        return slot

    def close(self, slot: int) -> None:
        """Frees a slot."""
        self._free.append(slot)

    def add(self, slots: list[int], tokens: Tensor) -> None:
        """Appends `tokens` [len(slots)] to the histories, without waiting for the device."""
        if not slots:
            return
        lengths = [self._lengths[slot] for slot in slots]
        self._grow(0, max(lengths) + 1)
        at, ends = rows_on_device((slots, lengths), self.device)
        self._history[at, ends] = tokens
        self._counts[at, tokens] += 1
        for slot in slots:
            self._lengths[slot] += 1

    def apply(
        self, logits: Tensor, rows: list[int], slots: list[int], setups: Sequence[SamplingSetup]
    ) -> None:
        """Applies the penalties of `setups` and of the histories in `slots` to `rows` of logits [R, V], in slot.

        A token that occurs twice in a history is written twice, with the same value.
        """
        row, at = rows_on_device((rows, slots), self.device)
        row = row[:, None]
        ids = self._history[at, : max(self._lengths[slot] for slot in slots)]
        counts = self._counts[at[:, None], ids]
        is_output = counts > 0
        is_seen = is_output | self._in_prompt[at[:, None], ids]
        repetition = self._column([max(setup.repetition_penalty, _LEAST_REPETITION) for setup in setups])
        values = logits[row, ids]
        values = torch.where(
            is_seen, torch.where(values > 0, values / repetition, values * repetition), values
        )
        values -= self._column([setup.frequency_penalty for setup in setups]) * counts
        values -= self._column([setup.presence_penalty for setup in setups]) * is_output
        logits[row, ids] = values

    def _column(self, values: list[float]) -> Tensor:
        return on_device(values, torch.float32, self.device)[:, None]

    def _grow(self, num_slots: int, length: int) -> None:
        """Grows the tensors to at least `num_slots` slots and histories of `length` tokens."""
        slots, width = self._history.shape
        if num_slots > slots:
            more = max(num_slots, 2 * slots) - slots
            self._counts = torch.cat([self._counts, self._counts.new_zeros(more, self._counts.shape[1])])
            self._in_prompt = torch.cat(
                [self._in_prompt, self._in_prompt.new_zeros(more, self._counts.shape[1])]
            )
            self._history = torch.cat([self._history, self._history.new_zeros(more, width)])
        if length > width:
            longer = max(length, 2 * width) - width
            self._history = torch.nn.functional.pad(self._history, (0, longer))
