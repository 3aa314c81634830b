"""The dense SwiGLU feed-forward, and a mixture of such experts split over the ep and etp ranks.

Legend: T tokens of the dp group's step, N tokens this rank owns, K experts per token, D emb_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3_dist.config import ModelConfig
from qwen3_dist.kernels import Half, Kernels
from qwen3_dist.layers.batch import StepBatch
from qwen3_dist.layers.experts import Experts
from qwen3_dist.layers.linear import Linear
from qwen3_dist.layers.norm import RMSNorm
from qwen3_dist.layout import padded_range
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.parallel.dispatch import (
    AllGatherDispatcher,
    AllToAllDispatcher,
    ExpertPlacement,
)


class FeedForward(nn.Module):
    """`fc3(silu(fc1(x)) * fc2(x))` over this rank's hidden columns: a partial sum over tp."""

    _half: Half | None = None  # this and the norm before it, once they are one

    def __init__(self, emb_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(emb_dim, hidden_dim, bias=False)
        self.fc2 = Linear(emb_dim, hidden_dim, bias=False)
        self.fc3 = Linear(hidden_dim, emb_dim, bias=False)

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """norm(x) [T, D] -> [T, D]."""
        if self._half is not None:
            return self._half.feed_forward(x)
        x = norm(x)
        return self.fc3(F.silu(self.fc1(x)) * self.fc2(x))

    def fuse(self, norm: RMSNorm, kernels: Kernels) -> None:
        """From now on `norm` and this are one call of a kernel, if it knows their form. Weights are packed."""
        if not norm.is_plain:
            return
        parts = (self.fc1.parts, self.fc2.parts, self.fc3.parts)
        weights = (*(part.weight for part in parts), *(part.scale for part in parts))
        sizes = (self.fc1.in_features, self.fc1.out_features)
        is_int8 = parts[0].scale is not None
        self._half = Half(kernels, norm.scale, *weights, *sizes, eps=norm.eps, is_int8=is_int8)


class MoEFeedForward(nn.Module):
    """Routes each token to its top experts, wherever they are, and adds up their answers."""

    _half: Half | None = None  # the form for few tokens and the norm before it, once they are one

    def __init__(self, config: ModelConfig, parallel: ParallelContext) -> None:
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        placement = ExpertPlacement.even(config.num_experts, parallel.ep.size)
        _, columns = padded_range(config.moe_hidden_dim, parallel.etp.size, parallel.etp.rank)
        self.all_to_all = AllToAllDispatcher(parallel.ep, parallel.etp, placement)
        self.all_gather = AllGatherDispatcher(placement, parallel.ep.rank)
        self._dp = parallel.dp
        # etp ranks send rows to each other one for one, so where they are of several dp groups, who may have
        # other numbers of tokens, all pad to the largest.
        self._tp_size = parallel.tp.size
        self._levels = parallel.tp.size % parallel.etp.size != 0
        self.gate = Linear(config.emb_dim, config.num_experts, bias=False)
        self.experts = Experts(len(placement.experts_of(parallel.ep.rank)), config.emb_dim, columns)

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """The form for few tokens: norm(x) [T, D], the same on every rank -> a partial sum over all of them."""
        if self._half is not None:
            return self._half.experts(x)
        x = norm(x)
        return self.experts(self.all_gather.select(x, *self.route(x)))

    def for_groups(self, x: Tensor, norm: RMSNorm, batch: StepBatch) -> Tensor:
        """The form for few tokens, where dp groups have tokens of their own: [T, D] -> a partial sum over tp."""
        if self._dp.size == 1:
            return self(x, norm)
        longest, rows = max(batch.group_tokens), batch.rows_of_groups
        everybody = self._dp.all_gather(F.pad(x, (0, 0, 0, longest - len(x))))
        if rows is None:
            return self._dp.reduce_scatter(self(everybody, norm))
        out = torch.zeros_like(everybody)
        out[rows] = self(everybody[rows], norm)
        return self._dp.reduce_scatter(out)[: len(x)]

    def fuse(self, norm: RMSNorm, kernels: Kernels) -> None:
        """From now on `norm` and this are one call of a kernel, if it knows their form. Weights are packed."""
        if not norm.is_plain:
            return
        experts = self.experts
        stacks, scales = (experts.fc1, experts.fc2, experts.fc3), experts.scales or (None, None, None)
        counts = (self.gate.out_features, len(experts.fc1), self.num_experts_per_tok, self.norm_topk_prob)
        sizes = (self.gate.in_features, experts.columns)
        members = (norm.scale, self.gate.weight, *stacks, *scales, self.all_gather.here, *counts, *sizes)
        self._half = Half(kernels, *members, eps=norm.eps, is_int8=experts.scales is not None)

    def dispatched(self, x: Tensor, num_real: int, batch: StepBatch) -> Tensor:
        """The form for many: x [N, D] of this rank's own tokens, padding from row `num_real` on -> [N, D]."""
        own = len(x)
        if self._levels:
            level = -(-max(batch.group_tokens) // self._tp_size)
            x = F.pad(x, (0, 0, 0, level - own))
        expert_ids, weights = self.route(x)
        expert_ids[num_real:] = -1
        received, handle = self.all_to_all.dispatch(x, expert_ids, weights)
        return self.all_to_all.combine(self.experts(received), handle)[:own]

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids and weights [N, K] of each token: softmax over all experts in fp32, then top-k.

        The weights are fp32, rounded to x's dtype as the checkpoints were trained.
        """
        probabilities = F.softmax(self.gate(x), dim=-1, dtype=torch.float32)
        weights, expert_ids = probabilities.topk(self.num_experts_per_tok, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return expert_ids, weights.to(x.dtype).float()
