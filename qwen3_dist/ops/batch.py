"""The tensors of one step: every sequence's new tokens side by side, with where their KV goes.

Legend: T = tokens of this step over all sequences, S = sequences, B = blocks of the
longest one that may come.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qwen3_dist.ops.adapter_rows import AdapterRows
from qwen3_dist.ops.transfer import on_device


@dataclass(frozen=True)
class StepBatch:
    """One step's input on one rank, on the model's device.

    Sequences that decode (one new token) come first, so that they can be attended to together.
    """

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, each token's place in its sequence
    slots: Tensor  # [T] int64, block * block_size + offset: where each token's K and V are written
    block_tables: Tensor  # [rows, B] int32, the blocks of all running sequences
    table_rows: Tensor  # [S] int64, each sequence's row of block_tables
    context_lens: Tensor  # [S] int64, tokens of each sequence after this step
    query_starts: Tensor  # [S + 1] int64, the row where each sequence's tokens begin, and T
    query_lens: tuple[int, ...]  # [S] new tokens of each sequence
    host_context_lens: tuple[int, ...]  # [S] the same as context_lens, without asking the device
    num_decodes: int  # leading sequences with exactly one new token
    all_to_all: bool  # how MoE layers dispatch this step; else every rank sees all tokens
    logits_rows: Tensor  # [L] int64, rows (of T) whose logits are wanted
    group_tokens: tuple[int, ...] = ()  # [dp] T of every dp group; MoE layers ask where there are several
    adapters: AdapterRows | None = None  # if some row of this dp group has one
    decodes_only: bool = False  # in all dp groups: this is a step that a CUDA graph can hold
    padding: Tensor | None = (
        None  # [T] bool, rows that only fill a graph's size; of all groups' rows in MoE layers
    )

    @property
    def largest_group(self) -> int:
        """T of the dp group that has most."""
        return max(self.group_tokens, default=self.token_ids.shape[0])

    def rows_of_groups(self, begin: int, end: int) -> Tensor | None:
        """int64 rows of tokens `begin` to `end` of every dp group, where each group's are padded to end - begin; None
        if none is padded. Made once a step."""
        key, length = (begin, end), end - begin
        if key not in self._rows_of_groups:
            lengths = [min(max(tokens - begin, 0), length) for tokens in self.group_tokens]
            rows = [group * length + row for group, tokens in enumerate(lengths) for row in range(tokens)]
            padded = min(lengths) < length
            device = self.token_ids.device
            self._rows_of_groups[key] = on_device(rows, torch.int64, device) if padded else None
        return self._rows_of_groups[key]

    @cached_property
    def _rows_of_groups(self) -> dict[tuple[int, int], Tensor | None]:
        return {}

    @cached_property
    def narrow(self) -> tuple[Tensor, Tensor, Tensor]:
        """Each sequence's own table [S, B], context_lens and query_starts as int32, made once a step."""
        return self.block_tables[self.table_rows], self.context_lens.int(), self.query_starts.int()


@dataclass(frozen=True)
class LayerCache:
    """One layer's KV blocks on one rank: each [blocks, block_size, n_kv_groups / tp, head_dim]."""

    keys: Tensor
    values: Tensor
