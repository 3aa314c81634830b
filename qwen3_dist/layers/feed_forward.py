"""The dense SwiGLU feed-forward, and a mixture of such experts split over the ep and etp ranks.

Legend: N tokens this rank owns, K experts per token, R rows received, D emb_dim, I this rank's hidden
columns, E all experts, e this rank's experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3_dist.config import ModelConfig
from qwen3_dist.kernels import kernels_for
from qwen3_dist.layers.linear import Linear
from qwen3_dist.layout import padded_range
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.parallel.dispatch import (
    AllGatherDispatcher,
    AllToAllDispatcher,
    DispatchedTokens,
    ExpertPlacement,
)


class FeedForward(nn.Module):
    """`fc3(silu(fc1(x)) * fc2(x))` over this rank's hidden columns: a partial sum over tp."""

    def __init__(self, emb_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(emb_dim, hidden_dim, bias=False)
        self.fc2 = Linear(emb_dim, hidden_dim, bias=False)
        self.fc3 = Linear(hidden_dim, emb_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.fc1(x), self.fc2(x)
        kernels = kernels_for(x)
        return self.fc3(kernels.silu_product(gate, up) if kernels else F.silu(gate) * up)


class Experts(nn.Module):
    """This rank's experts, stacked: fc1 and fc2 [e, I, D], fc3 [e, D, I]."""

    def __init__(self, num_experts: int, emb_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Parameter(torch.empty(num_experts, hidden_dim, emb_dim))
        self.fc2 = nn.Parameter(torch.empty(num_experts, hidden_dim, emb_dim))
        self.fc3 = nn.Parameter(torch.empty(num_experts, emb_dim, hidden_dim))

    def forward(self, received: DispatchedTokens) -> Tensor:
        """Each row's weighted sum over those of its experts that are here -> [R, D]."""
        x, ids, weights = received.tokens, received.expert_ids, received.weights
        kernels = kernels_for(x)
        if kernels is not None:
            return kernels.experts(x, self.fc1, self.fc2, self.fc3, ids, weights)
        rows, choice = (ids >= 0).nonzero(as_tuple=True)
        order = ids[rows, choice].argsort(stable=True)
        rows, choice = rows[order], choice[order]
        counts = torch.bincount(ids[rows, choice], minlength=self.fc1.shape[0]).tolist()
        answers = self._sorted(x[rows], counts).float() * weights[rows, choice, None]
        return torch.zeros_like(x, dtype=torch.float32).index_add_(0, rows, answers).to(x.dtype)

    def _sorted(self, x: Tensor, counts: list[int]) -> Tensor:
        """x [P, D] sorted by expert, `counts` [e] rows of each -> [P, D]."""
        out = torch.empty_like(x)
        start = 0
        for expert, count in enumerate(counts):
            if count:
                rows = slice(start, start + count)
                hidden = F.silu(x[rows] @ self.fc1[expert].T) * (x[rows] @ self.fc2[expert].T)
                torch.mm(hidden, self.fc3[expert].T, out=out[rows])
                start += count
        return out


class MoEFeedForward(nn.Module):
    """Routes each token to its top experts, wherever they are, and adds up their answers."""

    def __init__(self, config: ModelConfig, parallel: ParallelContext) -> None:
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        placement = ExpertPlacement.even(config.num_experts, parallel.ep.size)
        _, columns = padded_range(config.moe_hidden_dim, parallel.etp.size, parallel.etp.rank)
        self.all_to_all = AllToAllDispatcher(parallel.ep, parallel.etp, placement)
        self.all_gather = AllGatherDispatcher(placement, parallel.ep.rank)
        self.gate = Linear(config.emb_dim, config.num_experts, bias=False)
        self.experts = Experts(len(placement.experts_of(parallel.ep.rank)), config.emb_dim, columns)

    def forward(self, x: Tensor) -> Tensor:
        """The form for few tokens: x [T, D] is the same on every rank -> a partial sum over all of them."""
        return self.experts(self.all_gather.select(x, *self.route(x)))

    def dispatched(self, x: Tensor, num_real: int) -> Tensor:
        """The form for many: x [N, D] of this rank's own tokens, padding from row `num_real` on -> [N, D]."""
        expert_ids, weights = self.route(x)
        expert_ids[num_real:] = -1
        received, handle = self.all_to_all.dispatch(x, expert_ids, weights)
        return self.all_to_all.combine(self.experts(received), handle)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids and weights [N, K] of each token: softmax over all experts in fp32, then top-k.

        The weights are fp32, rounded to x's dtype as the checkpoints were trained.
        """
        probabilities = F.softmax(self.gate(x), dim=-1, dtype=torch.float32)
        weights, expert_ids = probabilities.topk(self.num_experts_per_tok, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return expert_ids, weights.to(x.dtype).float()
