"""A step's inputs on one rank: what its plan says, as tensors, and what earlier plans said that still holds.

Legend as in `ops/batch.py`: T tokens of the step, S sequences, L rows whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor

from qwen3_dist.ops.adapter_rows import AdapterRows
from qwen3_dist.ops.batch import StepBatch
from qwen3_dist.ops.transfer import on_device, rows_on_device
from qwen3_dist.protocol.step_plan import LAST_SAMPLED, SequenceStep, StepPlan


class StepInputs:
    """The block tables and the last sampled tokens of all running sequences, by slot, and the batch of each step.

    Tables stay on the device, so that a step's cost does not grow with its context. One row follows those of the
    slots: every block there is `spare_block`, to which the rows that fill up a CUDA graph write.
    """

    def __init__(
        self, max_num_seqs: int, max_blocks: int, block_size: int, device: torch.device, spare_block: int = 0
    ) -> None:
        """`max_blocks` are those of the longest sequence that may come."""
        self.last_sampled = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self.tables = torch.zeros(max_num_seqs + 1, max_blocks, dtype=torch.int32, device=device)
        self.tables[max_num_seqs].fill_(spare_block)
        self._blocks: list[list[int]] = [[] for _ in range(max_num_seqs)]  # the tables on the host
        self._block_size = block_size
        self._device = device

    def batch(self, plan: StepPlan, in_single_tokens: bool = False) -> StepBatch:
        """The plan's tensors on the device. `in_single_tokens`: each guess is a decode, as CUDA graphs take them."""
        index, values = self._take_blocks(plan.sequences)
        if in_single_tokens:
            plan = plan.in_single_tokens()
        return self._batch(plan, index, values)

    def _take_blocks(self, sequences: Iterable[SequenceStep]) -> tuple[list[int], list[int]]:
        """Keeps the new blocks on the host; returns where they go in the flat tables, and their ids."""
        index: list[int] = []
        values: list[int] = []
        width = self.tables.shape[1]
        for sequence in sequences:
            if sequence.new_blocks:
                slot, first = sequence.slot, sequence.first_block
                self._blocks[slot][first:] = sequence.new_blocks
                begin = slot * width + first
                index.extend(range(begin, begin + len(sequence.new_blocks)))
                values.extend(sequence.new_blocks)
        return index, values

    def _batch(self, plan: StepPlan, index: Sequence[int] = (), values: Sequence[int] = ()) -> StepBatch:
        sequences = plan.sequences
        slots = [sequence.slot for sequence in sequences]
        token_ids = [*chain.from_iterable(sequence.token_ids for sequence in sequences)]
        query_lens = tuple([len(sequence.token_ids) for sequence in sequences])
        context_lens = tuple([sequence.start + len(sequence.token_ids) for sequence in sequences])
        starts = [0, *accumulate(query_lens)]
        num_decodes = next((i for i, length in enumerate(query_lens) if length != 1), len(query_lens))
        positions, places = self._positions(sequences, num_decodes)
        parts = (token_ids, positions, places, slots, context_lens, starts, _drawn_rows(plan, starts))
        *sent, new_index, new_values = rows_on_device((*parts, index, values), self._device)
        tokens, positions_at, places_at, rows, lens, begins, logits_rows = sent
        if index:
            self.tables.view(-1)[new_index] = new_values.int()
        if LAST_SAMPLED in token_ids[:num_decodes]:
            known = tokens[:num_decodes]
            sampled = self.last_sampled[rows[:num_decodes]]
            tokens[:num_decodes] = torch.where(known == LAST_SAMPLED, sampled, known)
        return StepBatch(
            token_ids=tokens,
            positions=positions_at,
            slots=places_at,
            block_tables=self.tables,
            table_rows=rows,
            context_lens=lens,
            query_starts=begins,
            query_lens=query_lens,
            host_context_lens=context_lens,
            num_decodes=num_decodes,
            all_to_all=False,
            logits_rows=logits_rows,
            group_tokens=plan.group_tokens,
            adapters=self._adapter_rows(plan) if plan.adapted else None,
            decodes_only=plan.decodes_only and not plan.adapted,
        )

    def _positions(self, sequences: Sequence[SequenceStep], num_decodes: int) -> tuple[list[int], list[int]]:
        """Each token's position in its sequence, and its place in the cache: block * block_size + offset."""
        size, blocks = self._block_size, self._blocks
        decodes = sequences[:num_decodes]
        positions = [sequence.start for sequence in decodes]
        places = [
            blocks[sequence.slot][sequence.start // size] * size + sequence.start % size
            for sequence in decodes
        ]
        for sequence in sequences[num_decodes:]:
            start, end = sequence.start, sequence.start + len(sequence.token_ids)
            positions.extend(range(start, end))
            places.extend(chain.from_iterable(_runs(blocks[sequence.slot], start, end, size)))
        return positions, places

    def _adapter_rows(self, plan: StepPlan) -> AdapterRows | None:
        adapters = [sequence.adapter for sequence in plan.sequences for _ in sequence.token_ids]
        return AdapterRows.of(adapters, self._device)

    def keep_sampled(self, sampled: Sequence[SequenceStep], tokens: Tensor) -> None:
        """Keeps the tokens [L] that `sampled` got, all their draws in order, for the steps that follow.

        A sequence with guesses is planned again only when its tokens are known, so they are not kept.
        """
        if any(part.num_drafted for part in sampled):
            firsts = accumulate((1 + part.num_drafted for part in sampled[:-1]), initial=0)
            rows = [row for row, part in zip(firsts, sampled, strict=True) if not part.num_drafted]
            sampled = [part for part in sampled if not part.num_drafted]
            tokens = tokens[on_device(rows, torch.int64, self._device)]
        slots = [part.slot for part in sampled]
        self.last_sampled[on_device(slots, torch.int64, self._device)] = tokens


def _drawn_rows(plan: StepPlan, starts: Sequence[int]) -> Sequence[int]:
    """The rows [L] whose logits are wanted: a sequence's last, and the one in front of each guess."""
    if plan.decodes_only:
        return range(starts[-1])
    rows: list[int] = []
    for sequence, end in zip(plan.sequences, starts[1:], strict=True):
        if sequence.sample is not None:
            rows.extend(range(end - 1 - sequence.num_drafted, end))
    return rows


def _runs(blocks: Sequence[int], start: int, end: int, size: int) -> Iterator[range]:
    """The places of positions `start` to `end`, a run for each block."""
    for index in range(start // size, -(-end // size)):
        first = blocks[index] * size - index * size
        yield range(first + max(start, index * size), first + min(end, index * size + size))
