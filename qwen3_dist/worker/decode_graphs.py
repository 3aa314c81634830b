"""CUDA graphs of decode steps, captured for a few batch sizes.

A step of n tokens (decodes and draft tokens) is padded to the next captured size. Padding rows write to a spare block
that no sequence owns, go to no expert, and their logits are dropped. All dp groups run the size of the largest group.
Block tables stay at the same address. Each size has one MoE dispatcher, the same on all ranks: all-gather, or
all-to-all with a capacity, since neither waits for the host. Under pp a graph holds the blocks of one stage; hidden
states are received before a replay and sent after it.

Legend: S rows of a captured size, D emb_dim, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.ops.batch import LayerCache, StepBatch

_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)


@dataclass
class _Captured:
    batch: StepBatch  # the graph's static inputs
    received: Tensor | None  # [S, D] hidden states of the stage before; None on the first stage
    x: Tensor | None  # [S, D] hidden states after the graph's last block
    logits: Tensor | None  # [S, V] on tp rank 0 of the last stage
    graph: torch.cuda.CUDAGraph | None
    rows: int = 0  # rows of the last run; the others are padding


def can_capture(model: Qwen3Model) -> bool:
    """Whether this rank's decode steps run on the GPU without the host, so that a CUDA graph can hold them."""
    if model.device.type != "cuda" or model.parallel.staged:
        return False
    return all(moe.experts.stays_on_device for moe in model.moe_layers.values())


class DecodeGraphs:
    """The graphs of one rank. Capturing and running use collectives, so every rank of the layout must do both
    together."""

    def __init__(
        self,
        model: Qwen3Model,
        cache: list[LayerCache],
        max_rows: int,
        tables: Tensor,
        by_all_to_all: Callable[[int], bool] = lambda tokens: False,
    ) -> None:
        """Captures graphs for up to `max_rows` tokens.

        `tables` are the block tables of `StepInputs`. Their last row, and the last block of `cache`, are for padding.
        `by_all_to_all(tokens)` says whether a step of so many tokens, of all dp groups together, dispatches by
        all-to-all. Without a GPU nothing is captured, and `run` runs the padded step.
        """
        self._model, self._cache = model, cache
        self._stage = model.parallel.pipeline
        self._by_all_to_all = by_all_to_all
        num_blocks, self._block_size = cache[0].keys.shape[:2]
        self._tables = tables
        self._spare_block = num_blocks - 1
        self._device = cache[0].keys.device
        largest = min(max_rows, _SIZES[-1])
        sizes = [size for size in _SIZES if size < largest] + [largest]
        # The stream of all captures, since cuBLAS keeps a workspace for each stream: 32 MiB on an H200.
        self._side: torch.cuda.Stream | None = None
        self._captured: dict[int, _Captured] = {}
        for size in reversed(sizes):  # the largest first: the others share its memory pool
            self._captured[size] = self._capture(size)

    def can_run(self, batch: StepBatch, exact: bool = False) -> bool:
        """Whether a graph can run this step: it has only decodes, few enough, and, if the step is `exact`, the graph's
        dispatcher has no capacity. All dp groups get the same answer."""
        if not batch.decodes_only or batch.largest_group > max(self._captured):
            return False
        return not (exact and self.uses_all_to_all(batch))

    def uses_all_to_all(self, batch: StepBatch) -> bool:
        """Whether the graph that runs this step dispatches by all-to-all."""
        return self._captured[self._size(batch)].batch.all_to_all

    def _size(self, batch: StepBatch) -> int:
        return min(size for size in self._captured if size >= batch.largest_group)

    def run(self, batch: StepBatch) -> Tensor | None:
        """Runs the step. Returns logits [rows of the batch, V] on tp rank 0 of the last stage, which the next run
        overwrites; None on other ranks."""
        n = len(batch.query_lens)
        captured = self._captured[self._size(batch)]
        static = captured.batch
        if n != captured.rows:
            self._pad(static, n)
            captured.rows = n
        torch._foreach_copy_(
            [each[:n] for each in _inputs_of(static)],
            _inputs_of(batch),
        )
        if captured.received is not None and n:
            captured.received[:n].copy_(self._stage.receive(n, self._model.activation_template))
        x, logits = captured.x, captured.logits
        if captured.graph is None:
            x, logits = self._model.stage(static, self._cache, captured.received)
        else:
            captured.graph.replay()
        if not self._stage.is_last and n:
            assert x is not None
            self._stage.send(x[:n])  # on a GPU this is ordered before the next replay, which overwrites x
        return None if logits is None else logits[:n]

    def _pad(self, static: StepBatch, n: int) -> None:
        """Turns all rows from `n` on into padding."""
        assert static.padding is not None
        static.padding[:n], static.padding[n:] = False, True
        static.slots[n:] = self._spare_block * self._block_size
        static.table_rows[n:] = len(self._tables) - 1
        static.context_lens[n:] = 1

    def _capture(self, size: int) -> _Captured:
        batch = self._padding_batch(size)
        row = self._model.activation_template
        received = None if self._stage.is_first else row.new_zeros(size, row.shape[0])
        if self._device.type != "cuda":
            return _Captured(batch, received, None, None, None)
        if self._side is None:
            self._side = torch.cuda.Stream(self._device)
        side = self._side
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles kernels and creates communicators before the capture
                self._model.stage(self._padding_batch(size), self._cache, received)
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        pool = next((c.graph.pool() for c in self._captured.values() if c.graph is not None), None)
        with torch.cuda.graph(graph, pool=pool, stream=side):
            x, logits = self._model.stage(batch, self._cache, received)
        return _Captured(batch, received, x, logits, graph)

    def _padding_batch(self, size: int) -> StepBatch:
        """A batch of `size` padding rows: decodes whose KV goes to the spare block."""

        def full(value: int, *shape: int) -> Tensor:
            return torch.full(shape, value, dtype=torch.int64, device=self._device)

        rows = torch.arange(size + 1, device=self._device)
        return StepBatch(
            token_ids=full(0, size),
            positions=full(0, size),
            slots=full(self._spare_block * self._block_size, size),
            block_tables=self._tables,
            table_rows=full(len(self._tables) - 1, size),
            context_lens=full(1, size),
            query_starts=rows,
            query_lens=(1,) * size,
            host_context_lens=(self._tables.shape[1] * self._block_size,) * size,
            num_decodes=size,
            all_to_all=self._by_all_to_all(size * self._model.parallel.layout.dp),
            logits_rows=rows[:size],
            group_tokens=(size,) * self._model.parallel.layout.dp,
            decodes_only=True,
            padding=torch.ones(size, dtype=torch.bool, device=self._device),
        )


def _inputs_of(batch: StepBatch) -> list[Tensor]:
    """The inputs that are copied into a graph before each run. Block tables are updated in place instead."""
    return [batch.token_ids, batch.positions, batch.slots, batch.table_rows, batch.context_lens]
