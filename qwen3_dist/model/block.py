"""One transformer block of a rank: attention, feed-forward, and the collectives between them.

Legend: T tokens of this dp group's step (0 if it is idle), N = ceil(T / tp) tokens that a rank owns where tokens
travel to their experts, D emb_dim, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from qwen3_dist.config import ModelConfig
from qwen3_dist.expert_placement import ExpertPlacement
from qwen3_dist.layout import padded_range
from qwen3_dist.model.attention import GroupedQueryAttention
from qwen3_dist.model.feed_forward import FeedForward, MoEFeedForward, Transform
from qwen3_dist.model.norm import RMSNorm
from qwen3_dist.ops.base import Ops
from qwen3_dist.ops.batch import LayerCache, StepBatch
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.parallel.send_plan import OverflowFlag

# Of x [T, D], cos, sin [T, d], the cache and the batch: this rank's partial sums of attention [T, D], or in
# deterministic mode the whole sums
Attend = Callable[[Tensor, Tensor, Tensor, LayerCache, StepBatch], Tensor]


class TransformerBlock(nn.Module):
    """Attention and feed-forward with their residuals; x [T, D] is equal on all tp ranks."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        parallel: ParallelContext,
        placement: ExpertPlacement | None,
        ops: Ops,
        overflow: OverflowFlag | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self._tp = parallel.tp
        self._deterministic = parallel.deterministic
        self.norm1 = RMSNorm(config, config.emb_dim, ops)
        self.att = GroupedQueryAttention(config, layer, parallel, ops)
        self.norm2 = RMSNorm(config, config.emb_dim, ops)
        if placement is not None:
            self.use(MoEFeedForward(config, parallel, placement, ops, overflow))
        else:
            self.use(FeedForward(config, parallel, ops))

    def use(self, ff: FeedForward | MoEFeedForward) -> None:
        """Makes `ff` the feed-forward layer. No fused kernels compute the block any more."""
        self.ff = ff
        # Each with the norm before it. `finalize` may put kernels in their place.
        self.attend: Attend = partial(_after_norm, self.norm1, self.att)
        self.transform: Transform = partial(_after_norm, self.norm2, self.ff)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache, batch: StepBatch) -> Tensor:
        """x [T, D] -> [T, D]."""
        return self.feed_forward(x, self.attend(x, cos, sin, cache, batch), batch)

    def feed_forward(self, x: Tensor, attended: Tensor, batch: StepBatch) -> Tensor:
        """The rest of the block, from attention's partial sums on. Without own tokens, computes experts for other dp
        groups."""
        if isinstance(self.ff, MoEFeedForward):
            if batch.all_to_all:
                return self._dispatch(x, attended, self.ff, batch)
            x = self._added(x, attended)
            outputs = self.ff.gathered(x, self.transform, batch)
            if self._deterministic:
                return x + self.ff.total(self._tp.all_reduce(outputs))
            return self._tp.add_all_reduced(x, outputs)
        if not len(x):
            return x
        x = self._added(x, attended)
        return self._added(x, self.transform(x, None, batch.adapters))

    def _added(self, x: Tensor, output: Tensor) -> Tensor:
        """x + the output of attention or of a dense layer [T, D], which is whole in deterministic mode, and else a
        partial sum."""
        return x + output if self._deterministic else self._tp.add_all_reduced(x, output)

    def _dispatch(self, x: Tensor, attended: Tensor, moe: MoEFeedForward, batch: StepBatch) -> Tensor:
        """Tokens travel to their experts: each tp rank owns N of them, so that none is routed twice."""
        total = len(x)
        rows, chunk = padded_range(total, self._tp.size, self._tp.rank)
        if self._deterministic:
            own = (x + attended)[rows.start : rows.stop]
        else:
            own = F.pad(x[rows.start : rows.stop], (0, 0, 0, chunk - len(rows)))
            own = own + self._tp.reduce_scatter(F.pad(attended, (0, 0, 0, chunk * self._tp.size - total)))
        own = F.pad(own, (0, 0, 0, chunk - len(own)))  # [N, D]
        own = own + moe.dispatched(self.norm2(own), rows, batch)
        return self._tp.all_gather(own)[:total]


def _after_norm(norm: RMSNorm, layer: nn.Module, x: Tensor, *inputs: Any) -> Tensor:
    return layer(norm(x), *inputs)  # type: ignore[no-any-return]
