"""Builds a step's input tensors on one rank from its plan and from the block tables of earlier plans.

Legend as in `ops/batch.py`: T tokens of the step, S sequences, L rows whose logits are needed.
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
    """The block tables and last sampled tokens of all running sequences, by slot.

    Tables stay on the device, so building a batch does not take longer with a longer context. The tables have one more
    row than there are slots. All its entries are `spare_block`, to which padding rows of CUDA graphs write.
    """

    def __init__(
        self, max_num_seqs: int, max_blocks: int, block_size: int, device: torch.device, spare_block: int = 0
    ) -> None:
        """`max_blocks` is the number of blocks of a sequence of max_model_len tokens."""
        self.last_sampled = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self.tables = torch.zeros(max_num_seqs + 1, max_blocks, dtype=torch.int32, device=device)
        self.tables[max_num_seqs].fill_(spare_block)
        self._blocks: list[list[int]] = [[] for _ in range(max_num_seqs)]  # the block tables on the host
        self._block_size = block_size
        self._device = device

    def batch(self, plan: StepPlan, in_single_tokens: bool = False) -> StepBatch:
        """The plan's tensors on the device. `in_single_tokens` makes each draft token a sequence of one token, which
        CUDA graphs need."""
        index, values = self._add_blocks(plan.sequences)
        if in_single_tokens:
            plan = plan.in_single_tokens()
        return self._batch(plan, index, values)

    def _add_blocks(self, sequences: Iterable[SequenceStep]) -> tuple[list[int], list[int]]:
        """Adds new blocks to the tables on the host. Returns their indices in the flat tables, and the block ids."""
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
        positions, kv_slots = self._positions(sequences, num_decodes)
        parts = (token_ids, positions, kv_slots, slots, context_lens, starts, _logits_rows(plan, starts))
        *sent, new_index, new_values = rows_on_device((*parts, index, values), self._device)
        tokens, positions_at, kv_slots_at, rows, lens, begins, logits_rows = sent
        if index:
            self.tables.view(-1)[new_index] = new_values.int()
        if LAST_SAMPLED in token_ids[:num_decodes]:
            known = tokens[:num_decodes]
            sampled = self.last_sampled[rows[:num_decodes]]
            tokens[:num_decodes] = torch.where(known == LAST_SAMPLED, sampled, known)
        return StepBatch(
            token_ids=tokens,
            positions=positions_at,
            slots=kv_slots_at,
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
            adapted=plan.adapted,
            decodes_only=plan.decodes_only and not plan.adapted,
        )

    def _positions(self, sequences: Sequence[SequenceStep], num_decodes: int) -> tuple[list[int], list[int]]:
        """The position of each token in its sequence, and its slot in the KV cache: block * block_size + offset."""
        size, blocks = self._block_size, self._blocks
        decodes = sequences[:num_decodes]
        positions = [sequence.start for sequence in decodes]
        kv_slots = [
            blocks[sequence.slot][sequence.start // size] * size + sequence.start % size
            for sequence in decodes
        ]
        for sequence in sequences[num_decodes:]:
            start, end = sequence.start, sequence.start + len(sequence.token_ids)
            positions.extend(range(start, end))
            kv_slots.extend(chain.from_iterable(_runs(blocks[sequence.slot], start, end, size)))
        return positions, kv_slots

    def _adapter_rows(self, plan: StepPlan) -> AdapterRows | None:
        adapters = [sequence.adapter for sequence in plan.sequences for _ in sequence.token_ids]
        return AdapterRows.of(adapters, self._device)

    def keep_sampled(self, sampled: Sequence[SequenceStep], tokens: Tensor) -> None:
        """Stores the tokens [L] that were sampled for `sampled`, in their order, as inputs of later steps.

        Tokens of a sequence with draft tokens are not stored: its next step is planned when they are known.
        """
        if any(part.num_drafted for part in sampled):
            firsts = accumulate((1 + part.num_drafted for part in sampled[:-1]), initial=0)
            rows = [row for row, part in zip(firsts, sampled, strict=True) if not part.num_drafted]
            sampled = [part for part in sampled if not part.num_drafted]
            tokens = tokens[on_device(rows, torch.int64, self._device)]
        slots = [part.slot for part in sampled]
        self.last_sampled[on_device(slots, torch.int64, self._device)] = tokens


def _logits_rows(plan: StepPlan, starts: Sequence[int]) -> Sequence[int]:
    """The rows [L] whose logits are needed: the last of each sequence, and the row before each draft token."""
    if plan.decodes_only:
        return range(starts[-1])
    rows: list[int] = []
    for sequence, end in zip(plan.sequences, starts[1:], strict=True):
        if sequence.sample is not None:
            rows.extend(range(end - 1 - sequence.num_drafted, end))
    return rows


def _runs(blocks: Sequence[int], start: int, end: int, size: int) -> Iterator[range]:
    """The KV-cache slots of positions `start` to `end`, a range for each block."""
    for index in range(start // size, -(-end // size)):
        first = blocks[index] * size - index * size
        yield range(first + max(start, index * size), first + min(end, index * size + size))
