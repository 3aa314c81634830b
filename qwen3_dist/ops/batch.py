"""The input tensors of one step: the new tokens of all sequences, concatenated, and the attention metadata.

Legend: T tokens of the step, S sequences, B blocks of a sequence of max_model_len tokens, L rows whose logits are
needed.
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
    """The input of one step on one rank, on the model's device.

    Sequences with one new token (decodes) come first, so that attention can run them as one batch.
    """

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, position of each token in its sequence
    slots: Tensor  # [T] int64, KV-cache slot of each token: block * block_size + offset
    block_tables: Tensor  # [rows, B] int32, the blocks of all running sequences
    table_rows: Tensor  # [S] int64, each sequence's row of block_tables
    context_lens: Tensor  # [S] int64, tokens of each sequence after this step
    query_starts: Tensor  # [S + 1] int64, first row of each sequence, and T
    query_lens: tuple[int, ...]  # [S] new tokens of each sequence
    host_context_lens: tuple[int, ...]  # [S] context_lens on the host
    num_decodes: int  # leading sequences with exactly one new token
    all_to_all: bool  # the dispatcher of MoE layers in this step; else all-gather
    logits_rows: Tensor  # [L] int64, rows (of T) whose logits are needed
    group_tokens: tuple[int, ...] = ()  # [dp] T of every dp group, for MoE layers
    adapters: AdapterRows | None = None  # None if no row of this dp group has an adapter
    adapted: bool = False  # a row of some dp group has an adapter
    decodes_only: bool = False  # in all dp groups, so that a CUDA graph can run the step
    padding: Tensor | None = (
        None  # [T] bool, rows that only fill a graph's size; of all groups' rows in MoE layers
    )

    @property
    def largest_group(self) -> int:
        """The largest T of all dp groups."""
        return max(self.group_tokens, default=self.token_ids.shape[0])

    def rows_of_groups(self, begin: int, end: int) -> Tensor | None:
        """Rows int64 of the tokens `begin` to `end` of every dp group, in a tensor where each group is padded to
        end - begin rows; None if no group is padded. Computed once per step."""
        key, length = (begin, end), end - begin
        if key not in self._rows_of_groups:
            lengths = [min(max(tokens - begin, 0), length) for tokens in self.group_tokens]
            rows = [group * length + row for group, tokens in enumerate(lengths) for row in range(tokens)]
            padded = min(lengths) < length
            device = self.token_ids.device
            self._rows_of_groups[key] = on_device(rows, torch.int64, device) if padded else None
        return self._rows_of_groups[key]

    @property
    def adapter_of_row(self) -> Tensor:
        """[T] int64, the number of each row's adapter, counted from 1; 0: none."""
        return torch.zeros_like(self.token_ids) if self.adapters is None else self.adapters.by_row

    @cached_property
    def _rows_of_groups(self) -> dict[tuple[int, int], Tensor | None]:
        return {}

    @cached_property
    def int32_metadata(self) -> tuple[Tensor, Tensor, Tensor]:
        """The block table of each sequence [S, B], context_lens [S] and query_starts [S + 1], all int32. Computed once
        per step."""
        return self.block_tables[self.table_rows], self.context_lens.int(), self.query_starts.int()


@dataclass(frozen=True)
class LayerCache:
    """One layer's KV blocks on one rank: each [blocks, block_size, n_kv_groups / tp, head_dim], in the activations'
    dtype or as e4m3 codes (float8_e4m3fn) of keys / key_scale and values / value_scale."""

    keys: Tensor
    values: Tensor
    key_scale: float = 1.0
    value_scale: float = 1.0

    @property
    def is_fp8(self) -> bool:
        return self.keys.dtype == torch.float8_e4m3fn
