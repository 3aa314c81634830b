"""CUDA graphs of decode steps: the launches of a whole step in one, for a few batch sizes.

A step of n decodes, or of decodes and guesses with n tokens in all, runs as the next larger size that was captured;
the rows beyond n write to a block that no sequence owns, go to no expert, and their logits are dropped. With several
dp groups all run the size of the largest. Block tables stay where they are. How tokens go to experts is fixed for each
size, the same on all ranks: by all-gather, or by all-to-all with a capacity, which waits for no host. Under pp a graph
holds a stage's blocks: rows of the stage before are received before it runs, and sent on after.
Legend: S sequences of a size.
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
    batch: StepBatch
    arrived: Tensor | None  # [S, D] from the stage before, if there is one
    x: Tensor | None  # [S, D] of a graph's last block
    logits: Tensor | None  # [S, V] on tp rank 0 of the last stage
    graph: torch.cuda.CUDAGraph | None
    rows: int = 0  # of the last run; those beyond are padding


def can_capture(model: Qwen3Model) -> bool:
    """Whether this rank's steps are nothing but launches: on a GPU, nothing over the host."""
    if model.device.type != "cuda" or model.parallel.staged:
        return False
    return all(moe.experts.stays_on_device for moe in model.moe_layers.values())


class DecodeGraphs:
    """The graphs of one rank. Every rank of a layout must construct it, and run it, at the same time."""

    def __init__(
        self,
        model: Qwen3Model,
        cache: list[LayerCache],
        max_rows: int,
        tables: Tensor,
        by_all_to_all: Callable[[int], bool] = lambda tokens: False,
    ) -> None:
        """`max_rows` are the most tokens of a step. `tables` are the block tables of `StepInputs`, whose last row
        is nobody's, as is the last block of `cache`. `by_all_to_all` says how experts' rows travel in a step of so
        many tokens of all dp groups.

        Without a GPU, `run` runs the padded step itself.
        """
        self._model, self._cache = model, cache
        self._stage = model.parallel.pipeline
        self._by_all_to_all = by_all_to_all
        num_blocks, self._block_size = cache[0].keys.shape[:2]
        self._tables = tables
        self._spare = num_blocks - 1
        self._device = cache[0].keys.device
        largest = min(max_rows, _SIZES[-1])
        sizes = [size for size in _SIZES if size < largest] + [largest]
        self._captured: dict[int, _Captured] = {}
        for size in reversed(sizes):  # the largest first, whose memory the others share
            self._captured[size] = self._capture(size)

    def takes(self, batch: StepBatch, exact: bool = False) -> bool:
        """Whether this is a step of nothing but decodes, few enough. An `exact` one does not go where rows may have no
        room. The answer is the same in all dp groups."""
        if not batch.decodes_only or batch.largest_group > max(self._captured):
            return False
        return not (exact and self.goes_all_to_all(batch))

    def goes_all_to_all(self, batch: StepBatch) -> bool:
        """How experts' rows travel in the size that a step runs as."""
        return self._captured[self._size(batch)].batch.all_to_all

    def _size(self, batch: StepBatch) -> int:
        return min(size for size in self._captured if size >= batch.largest_group)

    def run(self, batch: StepBatch) -> Tensor | None:
        """Logits [S, V] on tp rank 0 of the last stage, which the next run overwrites; None on other ranks."""
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
        if captured.arrived is not None and n:
            captured.arrived[:n].copy_(self._stage.receive(n, self._model.activation_template))
        x, logits = captured.x, captured.logits
        if captured.graph is None:
            x, logits = self._model.stage(static, self._cache, captured.arrived)
        else:
            captured.graph.replay()
        if not self._stage.is_last and n:
            assert x is not None
            self._stage.send(x[:n])  # on a GPU before the next replay writes there
        return None if logits is None else logits[:n]

    def _pad(self, static: StepBatch, n: int) -> None:
        """Makes the rows from `n` on padding."""
        assert static.padding is not None
        static.padding[:n], static.padding[n:] = False, True
        static.slots[n:] = self._spare * self._block_size
        static.table_rows[n:] = len(self._tables) - 1
        static.context_lens[n:] = 1

    def _capture(self, size: int) -> _Captured:
        batch = self._empty(size)
        row = self._model.activation_template
        arrived = None if self._stage.is_first else row.new_zeros(size, row.shape[0])
        if self._device.type != "cuda":
            return _Captured(batch, arrived, None, None, None)
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(2):  # kernels are compiled and communicators set up outside of the capture
                self._model.stage(self._empty(size), self._cache, arrived)
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        pool = next((c.graph.pool() for c in self._captured.values() if c.graph is not None), None)
        with torch.cuda.graph(graph, pool=pool):
            x, logits = self._model.stage(batch, self._cache, arrived)
        return _Captured(batch, arrived, x, logits, graph)

    def _empty(self, size: int) -> StepBatch:
        """`size` decodes of one token each, in the spare block."""

        def full(value: int, *shape: int) -> Tensor:
            return torch.full(shape, value, dtype=torch.int64, device=self._device)

        rows = torch.arange(size + 1, device=self._device)
        return StepBatch(
            token_ids=full(0, size),
            positions=full(0, size),
            slots=full(self._spare * self._block_size, size),
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
    """What differs from one run of a graph to the next, beside the tables."""
    return [batch.token_ids, batch.positions, batch.slots, batch.table_rows, batch.context_lens]
