"""Embedding and output head, with the vocabulary split over the tp ranks; rows of the last rank are padded.

Legend: T tokens, L rows whose logits are needed, D emb_dim, V vocab_size, v rows of the vocabulary per rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen3_dist.layout import padded_range
from qwen3_dist.model.linear import Linear
from qwen3_dist.ops.base import LinearWeights, Matrix, Ops
from qwen3_dist.parallel.communicator import Communicator


class VocabParallelEmbedding(nn.Embedding):
    """This rank's rows of the embedding. An all-reduce adds the rows of other ranks."""

    def __init__(self, vocab_size: int, emb_dim: int, tp: Communicator, ops: Ops) -> None:
        rows, per_rank = padded_range(vocab_size, tp.size, tp.rank)
        # Weights are passed, since initializing them would import much of torch, even for a meta tensor.
        super().__init__(per_rank, emb_dim, _weight=torch.empty(per_rank, emb_dim))
        self._tp = tp
        self._rows = rows
        self._ops = ops
        self._shared: LinearWeights | None = None

    def share(self, weights: LinearWeights) -> None:
        """Uses the finalized weights of the tied head from now on."""
        self._shared = weights
        del self.weight

    def forward(self, token_ids: Tensor) -> Tensor:
        """[T] int64 -> [T, D]."""
        weights = self._shared or LinearWeights((Matrix(self.weight, self.num_embeddings),))
        if self._tp.size == 1:
            return self._ops.embedding(token_ids, weights)
        elsewhere = (token_ids < self._rows.start) | (token_ids >= self._rows.stop)
        local = (token_ids - self._rows.start).masked_fill(elsewhere, 0)
        return self._tp.all_reduce(self._ops.embedding(local, weights).masked_fill(elsewhere[:, None], 0))


class VocabParallelHead(Linear):
    """The output head: logits of this rank's rows, gathered on tp rank 0, which samples."""

    def __init__(self, emb_dim: int, vocab_size: int, tp: Communicator, ops: Ops) -> None:
        _, per_rank = padded_range(vocab_size, tp.size, tp.rank)
        super().__init__(emb_dim, per_rank, False, ops)
        self._tp = tp
        self._vocab_size = vocab_size

    def forward(self, x: Tensor) -> Tensor | None:  # type: ignore[override]
        """[L, D] -> [L, V] on tp rank 0, None on the others."""
        return self.gathered(super().forward(x))

    def gathered(self, logits: Tensor) -> Tensor | None:
        """This rank's logits [L, v] -> [L, V] on tp rank 0, None on the others."""
        whole = self._tp.gather(logits)
        return None if whole is None else whole[:, : self._vocab_size]
