"""Time of an MoE layer's router, experts and dispatch. `docs/cost-model.md` has the formulas.

Legend: S tokens of all dp groups, E experts, K experts per token.
"""

from __future__ import annotations

from math import ceil, exp, isinf, lgamma, sqrt

from cluster.hardware import FITTED, Cluster, WeightRates
from cluster.planning.collectives import Group
from cluster.planning.footprint import LayerSizes
from cluster.planning.imbalance import largest_of
from cluster.planning.products import MatmulTime
from qwen3_dist.config import ModelConfig
from qwen3_dist.errors import ConfigError
from qwen3_dist.layout import Layout
from qwen3_dist.parallel.expert_exchange import capacity, chosen_share, prefers_all_to_all

EXPERT_IMBALANCE: float = FITTED["expert_imbalance"]
EXPERT_EVENNESS: float = FITTED["expert_evenness"]


def touched_share(tokens: float, chosen: float, evenness: float) -> float:
    """Share of the experts that one or more of `tokens` tokens choose, of which each chooses the share `chosen`.

    How often an expert is chosen follows a beta distribution with the mean `chosen`; `evenness` is its first
    parameter. The larger it is, the more alike the experts are; inf: all are chosen equally often.
    """
    if chosen >= 1:
        return min(1.0, tokens)
    if isinf(evenness):
        return 1 - (1 - chosen) ** tokens
    whole = evenness / chosen
    rest = whole - evenness
    missed = lgamma(rest + tokens) - lgamma(rest) + lgamma(whole) - lgamma(whole + tokens)
    return 1 - exp(missed)


class ExpertTimes:
    """Times of one MoE layer of `layout` in a step.

    groups: those of a rank, by name. router, experts: times of their products. reached: what the experts' products
    reach. item: bytes of an activation. read_s: seconds to read a byte. imbalance, evenness: as of `CostModel`.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: Layout,
        cluster: Cluster,
        *,
        sizes: LayerSizes,
        groups: dict[str, Group],
        router: MatmulTime,
        experts: MatmulTime,
        reached: WeightRates,
        item: float,
        read_s: float,
        imbalance: float,
        evenness: float,
    ) -> None:
        if not 1 <= imbalance < float("inf"):
            raise ConfigError(f"expert_imbalance must be at least 1 (even), not {imbalance:g}")
        if not evenness > 0:
            raise ConfigError(f"expert_evenness must be positive, not {evenness:g}")
        self._config, self._layout, self._kind = config, layout, cluster.device_kind
        self._sizes, self._router, self._experts, self._reached = sizes, router, experts, reached
        self._tp, self._dp, self._ep, self._etp = (groups[name] for name in ("tp", "dp", "ep", "etp"))
        self._item, self._read_s, self._evenness = item, read_s, evenness
        self._imbalance = imbalance if layout.ep > 1 else 1.0
        self._chosen = config.num_experts_per_tok / config.num_experts
        self._spread = largest_of(layout.ep) * sqrt(1 - self._chosen)
        self._sent_share = chosen_share(config.num_experts, config.num_experts_per_tok, sizes.experts_here)

    def parts(self, tokens: float, hidden: float, all_reduce: float) -> dict[str, float]:
        """Seconds by operation, with the dispatcher that the engine chooses for `tokens` tokens of each dp group, of
        `hidden` bytes. `all_reduce`: seconds of one over tp."""
        layout, config = self._layout, self._config
        if prefers_all_to_all(layout, config, tokens * layout.dp, device=self._kind):
            own = tokens / layout.tp
            sent = own * layout.etp * layout.ep * self._sent_share  # rows, this rank's own included
            if self._kind == "cuda":  # fixed capacity: empty slots are sent too
                sent = layout.ep * capacity(layout, config, ceil(own) * layout.etp)
            row = config.emb_dim * self._item
            routing = 8 * config.num_experts_per_tok  # id and weight, fp32
            dispatch = self._ep.all_to_all(sent * (row + routing)) + self._ep.all_to_all(sent * row)
            columns = self._etp.all_gather(own * layout.etp * (row + routing))
            columns += self._etp.reduce_scatter(own * layout.etp * row)
            return {
                "router": self._router.seconds(own, self._sizes.gate),
                "experts": self.seconds(tokens * layout.dp),
                "dispatch": dispatch + columns,
                "tp all-reduce": self._tp.reduce_scatter(hidden) + self._tp.all_gather(hidden),
            }
        all_tokens = hidden * layout.dp
        return {
            "router": self._router.seconds(tokens * layout.dp, self._sizes.gate),
            "experts": self.seconds(tokens * layout.dp),
            "dispatch": self._dp.all_gather(all_tokens) + self._dp.reduce_scatter(all_tokens),
            "tp all-reduce": 2 * all_reduce,
        }

    def seconds(self, tokens: float) -> float:
        """Seconds of the experts on the busiest rank for `tokens` tokens of all groups.

        The busiest rank has more (token, expert) pairs than the mean, and touches as many experts as it would with
        proportionally more tokens.
        """
        config, sizes = self._config, self._sizes
        even = tokens * config.num_experts_per_tok * sizes.experts_here / config.num_experts
        mean = min(even * self._imbalance, tokens * config.num_experts_per_tok)
        pairs = mean + self._spread * sqrt(mean)
        pairs = min(pairs, tokens * min(config.num_experts_per_tok, sizes.experts_here))
        load = pairs / even if even else 1.0
        share = touched_share(tokens * load, self._chosen, self._evenness)
        touched = max(sizes.experts_here * share, 1e-9)
        reached = self._reached
        read = touched + reached.idle_expert_reads * (sizes.experts_here - touched)
        product = self._experts.seconds(
            pairs / read, read * sizes.expert, reached.expert_efficiency, reached.expert_read_efficiency
        )
        moved = pairs * self._item * (3 * sizes.expert_columns + 2 * config.emb_dim) * self._read_s
        return product + moved
