"""How long a collective takes among ranks that share nodes: latency and bandwidth terms.

Legend: n ranks of the group, g of them on a node, B bytes as each operation says.
"""

from __future__ import annotations

from math import ceil, log2

from cluster.hardware import Cluster, Link


class Group:
    """`size` ranks, `per_node` of them on each node they touch.

    A collective has a latency for each doubling of its ranks (trees and recursive doubling), and moves its
    bytes over both kinds of link at once; of what crosses nodes each node receives one copy, except in an
    all-to-all, whose rows differ.
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
        """Every rank gets all `total` bytes, its own part of n included."""
        return self._one_copy("all_gather", total)

    def reduce_scatter(self, total: float) -> float:
        """Each rank has `total` bytes and gets its part of n, summed."""
        return self._one_copy("reduce_scatter", total)

    def all_reduce(self, total: float) -> float:
        """Each rank has `total` bytes and gets their sum: a reduce-scatter and an all-gather, 2 (n - 1) / n."""
        if self.size == 1:
            return 0.0
        latency, inside, between = self._terms["all_reduce"]
        return latency + 2 * total * max((1 - 1 / self.size) * inside, self._one_copy_share * between)

    def all_to_all(self, sent: float) -> float:
        """Each rank sends `sent` bytes, spread evenly over all n of which it is one."""
        if self.size == 1:
            return 0.0
        latency, inside, between = self._terms["all_to_all"]
        return latency + sent * max(self._inside_share * inside, self._across_share * between)

    def _one_copy(self, kind: str, total: float) -> float:
        if self.size == 1:
            return 0.0
        latency, inside, between = self._terms[kind]
        near = 1 - 1 / self.size  # what came from other nodes is passed on inside this one
        return latency + total * max(near * inside, self._one_copy_share * between)


def _seconds_per_byte(link: Link) -> float:
    return 1 / (link.bytes_per_s * link.efficiency)


def groups_of(cluster: Cluster, tp: int, dp: int, etp: int) -> dict[str, Group]:
    """The groups of a rank: `tp`, `dp` (the same tp rank of other groups), `ep` and `etp`.

    Ranks of a stage fill nodes in order; tp is innermost, then dp, and etp innermost of the experts.
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
