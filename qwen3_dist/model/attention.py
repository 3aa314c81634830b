"""Grouped-query attention, split by heads over the tp ranks.

Legend: T tokens, D emb_dim, H this rank's heads, G this rank's KV groups, d head_dim.
"""

from __future__ import annotations

from torch import Tensor, nn

from qwen3_dist.config import ModelConfig
from qwen3_dist.model.linear import Linear, join, products
from qwen3_dist.model.norm import RMSNorm
from qwen3_dist.model.rope import apply_rope
from qwen3_dist.ops.batch import LayerCache, StepBatch
from qwen3_dist.ops.kernels import Half, Kernels, row_kernels_for
from qwen3_dist.ops.paged_attention import paged_attention, write_cache


def kv_groups_per_rank(n_kv_groups: int, tp: int) -> int:
    """KV groups a rank holds; where tp exceeds them each group is replicated on tp / n_kv_groups ranks."""
    return max(1, n_kv_groups // tp)


class GroupedQueryAttention(nn.Module):
    """This rank's heads. The output is a partial sum: adding it up over tp is the caller's part."""

    fused: Half | None = None  # this and the norm before it, once they are one

    def __init__(self, config: ModelConfig, layer: int, tp: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.window = config.window_of_layer(layer)
        heads, groups = config.n_heads // tp, kv_groups_per_rank(config.n_kv_groups, tp)
        bias = config.attention_bias
        self.W_query = Linear(config.emb_dim, heads * config.head_dim, bias=bias)
        self.W_key = Linear(config.emb_dim, groups * config.head_dim, bias=bias)
        self.W_value = Linear(config.emb_dim, groups * config.head_dim, bias=bias)
        self.out_proj = Linear(heads * config.head_dim, config.emb_dim, bias=bias)
        self.q_norm = make_norm(config, config.head_dim) if config.qk_norm else None
        self.k_norm = make_norm(config, config.head_dim) if config.qk_norm else None

    def forward(
        self, x: Tensor, norm: RMSNorm, cos: Tensor, sin: Tensor, cache: LayerCache, batch: StepBatch
    ) -> Tensor:
        """norm(x) [T, D] -> [T, D], this rank's share of the sum."""
        if self.fused is not None and batch.adapters is None:
            return self.fused.attention(x, (cache.keys, cache.values), (cos, sin), batch.where)
        projected = products(norm(x), batch.adapters, self.W_query, self.W_key, self.W_value)
        q, k, v = (out.unflatten(1, (-1, self.head_dim)) for out in projected)
        q = self._rotate(q, k, v, cos, sin, cache, batch)
        return self.out_proj(paged_attention(q, cache, batch, self.window).flatten(1), batch.adapters)

    def join(self) -> None:
        """Makes the products of one input one."""
        join(self.W_query, self.W_key, self.W_value)

    def fuse(self, norm: RMSNorm, kernels: Kernels) -> None:
        """From now on `norm` and this are one call of a kernel, if it knows their form. Weights are packed."""
        norms = (norm, self.q_norm, self.k_norm)
        if not all(each is None or each.is_plain for each in norms):
            return
        parts = [each.parts for each in (self.W_query, self.W_key, self.W_value, self.out_proj)]
        scales = (each.scale if each is not None else None for each in norms)
        by_kind = (getattr(part, kind) for kind in ("weight", "scale", "bias") for part in parts)
        heads, groups = (size.out_features // self.head_dim for size in (self.W_query, self.W_key))
        sizes = (self.out_proj.out_features, heads, groups, self.head_dim, self.window or 0)
        is_int8 = parts[0].scale is not None
        self.fused = Half(kernels, *scales, *by_kind, *sizes, eps=norm.eps, is_int8=is_int8)

    def _rotate(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache, batch: StepBatch
    ) -> Tensor:
        """Norms and rotates q [T, H, d] and k [T, G, d], and stores k and v. Returns q, which may be changed."""
        kernels = row_kernels_for(q) if self.q_norm is None or self.q_norm.is_plain else None
        norms = (self.q_norm, self.k_norm) if self.q_norm is not None and self.k_norm is not None else None
        if kernels is not None:
            scales = (norms[0].scale, norms[1].scale) if norms else None
            eps = norms[0].eps if norms else 0.0
            return kernels.rotate(q, k, v, cache.keys, cache.values, scales, cos, sin, batch.slots, eps)
        if norms:
            q, k = norms[0](q), norms[1](k)
        write_cache(cache, apply_rope(k, cos, sin), v, batch.slots)
        return apply_rope(q, cos, sin)


def make_norm(config: ModelConfig, dim: int) -> RMSNorm:
    return RMSNorm(dim, config.rms_norm_eps, config.rms_norm_shift, config.qwen3_compatible)
