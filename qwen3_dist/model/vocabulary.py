"""Embedding and output head, split by vocabulary over the tp ranks (the last rank's rows are padded).

Legend: T tokens, L rows whose logits are wanted, D emb_dim, V vocab_size, v rows per rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen3_dist.layout import padded_range
from qwen3_dist.model.linear import as_int8, frozen
from qwen3_dist.model.norm import RMSNorm
from qwen3_dist.ops.kernels import Half, Kernels, Weights, linears, rows_of_packed
from qwen3_dist.parallel.communicator import Communicator


class VocabParallelEmbedding(nn.Embedding):
    """This rank's rows of the embedding; token ids of other ranks' rows come in by all-reduce."""

    def __init__(self, vocab_size: int, emb_dim: int, tp: Communicator) -> None:
        rows, per_rank = padded_range(vocab_size, tp.size, tp.rank)
        # Drawing its first weights would import half of torch, even for a meta tensor.
        super().__init__(per_rank, emb_dim, _weight=torch.empty(per_rank, emb_dim))
        self._tp = tp
        self._rows = rows

    def forward(self, token_ids: Tensor) -> Tensor:
        """[T] int64 -> [T, D]."""
        if self._tp.size == 1:
            return self._look_up(token_ids)
        elsewhere = (token_ids < self._rows.start) | (token_ids >= self._rows.stop)
        local = (token_ids - self._rows.start).masked_fill(elsewhere, 0)
        return self._tp.all_reduce(self._look_up(local).masked_fill(elsewhere[:, None], 0))

    def _look_up(self, rows: Tensor) -> Tensor:
        if self.weight.dim() == 3:  # it is that of a head tied to it, which was packed
            return rows_of_packed(self.weight, rows, self.embedding_dim)
        return super().forward(rows)


class VocabParallelHead(nn.Module):
    """Logits of this rank's rows, gathered on the group's rank 0, which samples."""

    scale: Tensor | None = None  # fp32 [v] of int8 weights

    def __init__(self, emb_dim: int, vocab_size: int, tp: Communicator) -> None:
        _, per_rank = padded_range(vocab_size, tp.size, tp.rank)
        super().__init__()
        self.weight = nn.Parameter(torch.empty(per_rank, emb_dim))
        self._tp = tp
        self._vocab_size = vocab_size
        self.rows_per_rank = per_rank

    def quantize(self) -> None:
        """Keeps the weights as int8 from now on; those of an embedding tied to it stay as they are."""
        self.weight, self.scale = as_int8(self.weight)

    def pack(self, kernels: Kernels) -> None:
        """Keeps the weights as the kernels read them from now on."""
        self.weight = frozen(kernels.pack(self.weight))

    def fused(self, norm: RMSNorm, kernels: Kernels) -> Half | None:
        """`norm` and this as a part of a kernel, if it knows their form. The weight is packed."""
        if not norm.is_plain:
            return None
        members = (norm.scale, self.weight, self.scale, len(norm.scale), self.rows_per_rank)
        return Half(kernels, *members, eps=norm.eps, is_int8=self.scale is not None)

    def forward(self, x: Tensor) -> Tensor | None:
        """[L, D] -> [L, V] on tp rank 0, None on the others."""
        return self.gathered(linears(x, Weights(self.weight, self.rows_per_rank, self.scale))[0])

    def gathered(self, logits: Tensor) -> Tensor | None:
        """This rank's part [L, v] of the logits -> as `forward`."""
        whole = self._tp.gather(logits)
        return None if whole is None else whole[:, : self._vocab_size]
