"""Time of collectives within and between nodes: latency and bandwidth terms. `docs/cost-model.md` has the formulas.

Legend: n ranks in the group.
"""

from __future__ import annotations

from math import ceil, log2

from cluster.hardware import Cluster, Link


class Group:
    """A group of `size` ranks, `per_node` of them on each of its nodes.

    A collective takes one latency per doubling of its ranks (trees and recursive doubling), and the longer of its
    transfers over links inside nodes and between nodes, which overlap. Each node receives one copy of what comes from
    other nodes, except in an all-to-all, where each rank receives different rows.
    """

    def __init__(self, size: int, per_node: int, cluster: Cluster) -> None:
        self.size = size
        self._inside_share = (per_node - 1) / size
        self._one_copy_share = (size - per_node) / size / per_node
        self._across_share = (size - per_node) / size
        inside_hops = ceil(log2(per_node)) if per_node > 1 else 0
        across_hops = ceil(log2(size / per_node)) if size > per_node else 0
        self._terms: dict[str, tuple[float, float, float]] = {}
        for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
            inside, between = cluster.inside.of(kind), cluster.between.of(kind)
            latency = inside_hops * inside.latency_s + across_hops * between.latency_s
            self._terms[kind] = (latency, _seconds_per_byte(inside), _seconds_per_byte(between))

    def all_gather(self, total: float) -> float:
        """Seconds until every rank has all `total` bytes, of which each rank starts with 1 / n."""
        return self._one_copy("all_gather", total)

    def reduce_scatter(self, total: float) -> float:
        """Seconds until each rank has its 1 / n of the sum; each starts with `total` bytes."""
        return self._one_copy("reduce_scatter", total)

    def all_reduce(self, total: float) -> float:
        """Seconds to sum `total` bytes over all ranks: a reduce-scatter and an all-gather, factor 2 (n - 1) / n."""
        if self.size == 1:
            return 0.0
        latency, inside, between = self._terms["all_reduce"]
        return latency + 2 * total * max((1 - 1 / self.size) * inside, self._one_copy_share * between)

    def all_to_all(self, sent: float) -> float:
        """Seconds if each rank sends `sent` bytes, spread evenly over all n ranks, itself included."""
        if self.size == 1:
            return 0.0
        latency, inside, between = self._terms["all_to_all"]
        return latency + sent * max(self._inside_share * inside, self._across_share * between)

    def _one_copy(self, kind: str, total: float) -> float:
        if self.size == 1:
            return 0.0
        latency, inside, between = self._terms[kind]
        inside_share = 1 - 1 / self.size  # bytes from other nodes are passed on inside the node
        return latency + total * max(inside_share * inside, self._one_copy_share * between)


def _seconds_per_byte(link: Link) -> float:
    return 1 / (link.bytes_per_s * link.efficiency)


def groups_of(cluster: Cluster, tp: int, dp: int, etp: int) -> dict[str, Group]:
    """The groups of a rank: `tp`, `dp` (its tp rank in all dp groups), `ep` and `etp`.

    The ranks of a stage fill nodes in order: tp varies fastest, then dp; for experts, etp varies fastest, then ep.
    """
    stage = tp * dp
    node = min(cluster.devices_per_node, stage)

    def on_node(stride: int, size: int) -> int:
        return max(1, min(size, node // stride))

    return {
        "tp": Group(tp, on_node(1, tp), cluster),
        "dp": Group(dp, on_node(tp, dp), cluster),
        "etp": Group(etp, on_node(1, etp), cluster),
        "ep": Group(stage // etp, on_node(etp, stage // etp), cluster),
    }
