"""Grouped-query attention, with heads split over the tp ranks.

Legend: T tokens, D emb_dim, H this rank's heads, G this rank's KV groups, d head_dim.
"""

from __future__ import annotations

from torch import Tensor, nn

from qwen3_dist.config import ModelConfig
from qwen3_dist.model.linear import Linear, LinearGroup, RowParallel
from qwen3_dist.model.norm import RMSNorm
from qwen3_dist.ops.base import Ops
from qwen3_dist.ops.batch import LayerCache, StepBatch
from qwen3_dist.parallel.context import ParallelContext


def kv_groups_per_rank(n_kv_groups: int, tp: int) -> int:
    """KV groups of a rank. If tp is larger than n_kv_groups, each group is replicated on tp / n_kv_groups ranks."""
    return max(1, n_kv_groups // tp)


class GroupedQueryAttention(nn.Module):
    """Attention of this rank's heads. The output is a partial sum, which the caller all-reduces over tp; in
    deterministic mode it is the whole sum. Keys and values that are kept in fp8 are divided by `key_scale` and
    `value_scale`."""

    key_scale = 1.0
    value_scale = 1.0

    def __init__(self, config: ModelConfig, layer: int, parallel: ParallelContext, ops: Ops) -> None:
        super().__init__()
        self._ops = ops
        tp = parallel.tp.size
        self.head_dim = config.head_dim
        self.window = config.window_of_layer(layer)
        heads, groups = config.n_heads // tp, kv_groups_per_rank(config.n_kv_groups, tp)
        bias = config.attention_bias
        self.W_query = Linear(config.emb_dim, heads * config.head_dim, bias, ops)
        self.W_key = Linear(config.emb_dim, groups * config.head_dim, bias, ops)
        self.W_value = Linear(config.emb_dim, groups * config.head_dim, bias, ops)
        inputs = config.n_heads * config.head_dim
        self.out_proj = RowParallel(inputs, config.emb_dim, bias, ops, parallel.tp, parallel.deterministic)
        self.q_norm = RMSNorm(config, config.head_dim, ops) if config.qk_norm else None
        self.k_norm = RMSNorm(config, config.head_dim, ops) if config.qk_norm else None
        self.qkv = LinearGroup(ops, self.W_query, self.W_key, self.W_value)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache, batch: StepBatch) -> Tensor:
        """x [T, D] -> partial or whole sum [T, D]."""
        q, k, v = (out.unflatten(1, (-1, self.head_dim)) for out in self.qkv.products(x, batch.adapters))
        norms = (self.q_norm.weights, self.k_norm.weights) if self.q_norm and self.k_norm else None
        q = self._ops.rotate_and_store(q, k, v, norms, cos, sin, cache, batch.slots)
        attended = self._ops.attention(q, cache, batch, self.window)
        return self.out_proj(attended.flatten(1), batch.adapters)
