"""A rank's SwiGLU experts on the rows it received.

Legend: R rows, K experts per token, D emb_dim, I hidden columns, e experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen3_dist.ops.base import ExpertWeights, Ops
from qwen3_dist.parallel.dispatch import DispatchedTokens


class Experts(nn.Module):
    """This rank's experts, stacked: fc1 and fc2 [e, I, D], fc3 [e, D, I]."""

    def __init__(self, num_experts: int, emb_dim: int, hidden_dim: int, ops: Ops) -> None:
        super().__init__()
        self._ops = ops
        self._columns = hidden_dim
        self._finalized: ExpertWeights | None = None
        self.fc1 = nn.Parameter(torch.empty(num_experts, hidden_dim, emb_dim))
        self.fc2 = nn.Parameter(torch.empty(num_experts, hidden_dim, emb_dim))
        self.fc3 = nn.Parameter(torch.empty(num_experts, emb_dim, hidden_dim))
        # [1 + e] int64, tokens so far for each expert after those for experts elsewhere; never on meta.
        self.all_counts = torch.zeros(num_experts + 1, dtype=torch.int64, device="cpu")

    def forward(self, received: DispatchedTokens) -> Tensor:
        """Each row's weighted sum over those of its experts that are here -> [R, D]."""
        x, ids, routing = received.tokens, received.expert_ids, received.weights
        self.count_on(x.device)
        return self._ops.experts(x, self.weights, ids, routing, self.all_counts)

    @property
    def weights(self) -> ExpertWeights:
        """As they were loaded, or in the form that the Ops gave them."""
        return self._finalized or ExpertWeights((self.fc1, self.fc2, self.fc3), self._columns)

    def finalize(self, int8: bool = False) -> None:
        """Gives the weights the form that the Ops reads fastest, rounded to int8 if asked."""
        self._finalized = self._ops.finalize_experts(self.weights, int8)
        del self.fc1, self.fc2, self.fc3  # so that memory holds them once

    @property
    def stays_on_device(self) -> bool:
        """Whether a GPU computes them without asking the host, as a CUDA graph needs."""
        return self._ops.experts_stay_on_device(self.weights)

    def count_on(self, device: torch.device) -> None:
        """Keeps `counts` there from now on."""
        if self.all_counts.device != device:
            self.all_counts = self.all_counts.to(device)

    @property
    def counts(self) -> Tensor:
        """[e] int64, rows that each expert has computed so far."""
        return self.all_counts[1:]

    def as_kept(self, stacks: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        """`stacks`, fc1 and fc2 [n, I, D] and fc3 [n, D, I] as a checkpoint has them, in the form of
        `weights.tensors`. Changes nothing here."""
        if self._finalized is None:
            return stacks
        int8 = self._finalized.scales is not None
        return self._ops.finalize_experts(ExpertWeights(stacks, self._columns), int8).tensors

    def replace(self, places: Tensor, kept: tuple[Tensor, ...]) -> None:
        """Puts other experts' weights, as `as_kept` made them, in these places [n]; they have computed no rows yet.

        Copies alone, of tensors on the weights' device, for which a GPU's host does not wait.
        """
        for old, new in zip(self.weights.tensors, kept, strict=True):
            old.index_copy_(0, places, new)
        self.counts.index_fill_(0, places, 0)
