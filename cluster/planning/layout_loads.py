"""One layout at growing loads: what its cache and the limits let it serve, and what a rate of arrivals makes of it.

Loads are counted in sequences of one dp group, since all groups of all replicas share requests evenly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from cluster.hardware import Cluster
from cluster.planning.planner import PlannedLayout, PlanRequest, predict
from qwen3_dist.config import ModelConfig
from qwen3_dist.layout import Layout


@dataclass(frozen=True)
class RatedLayout:
    """A layout under `rate` requests/s.

    planned: the prediction at the load that the rate comes to. in_flight: requests in the service by Little's law.
    most_per_s: requests/s that it serves within its cache and the limits; 0 if it keeps no limit even with one request
    in each dp group.
    capacity_per_s: the same without the limits.
    """

    planned: PlannedLayout
    rate: float
    in_flight: float
    most_per_s: float
    capacity_per_s: float

    @property
    def holds(self) -> bool:
        """Whether it serves the rate within its cache and the limits."""
        return self.planned.fits and self.most_per_s >= self.rate

    @property
    def headroom(self) -> float:
        """Share of the rate that could come in addition, within cache and limits; negative if it does not hold."""
        return self.most_per_s / self.rate - 1

    def as_json(self) -> dict[str, object]:
        """The object that `qwen3-dist plan --rate --json` prints for a layout."""
        return {
            **self.planned.as_json(),
            "requests_per_s": self.rate,
            "in_flight": round(self.in_flight, 3),
            "most_requests_per_s": round(self.most_per_s, 3),
            "capacity_requests_per_s": round(self.capacity_per_s, 3),
            "holds": self.holds,
            "headroom": round(self.headroom, 4),
        }


class LayoutLoads:
    """Predictions of `layout` on `cluster` for any number of requests in flight; `request.concurrency` is ignored."""

    def __init__(self, config: ModelConfig, layout: Layout, cluster: Cluster, request: PlanRequest) -> None:
        self.config, self.layout, self.cluster, self.request = config, layout, cluster, request
        self.groups = cluster.replicas(layout.world) * layout.dp
        self._predictions: dict[int, PlannedLayout] = {}
        self.fits = self.at(1).fits
        self.largest = max(1, self._largest()) if self.fits else 0

    def at(self, sequences: int) -> PlannedLayout:
        """The prediction with `sequences` in each dp group."""
        if sequences not in self._predictions:
            load = replace(self.request, concurrency=sequences * self.groups)
            self._predictions[sequences] = predict(self.config, self.layout, self.cluster, load, spread=True)
        return self._predictions[sequences]

    def requests_per_s(self, sequences: int) -> float:
        """Requests that the whole cluster finishes in a second with `sequences` in each dp group."""
        return (self.at(sequences).tokens_per_s or 0.0) / self.request.output_len

    def most_within_limits(self) -> int:
        """The most sequences of a dp group that fit into its cache within the limits; 0 if one alone exceeds them."""
        return last(self.largest, lambda sequences: self.at(sequences).meets_limits(self.request))

    def under(self, rate: float) -> RatedLayout:
        """The steady state under `rate` requests/s.

        Little's law: requests in flight = rate * time in the service, which is N / X(N) with N requests in flight of
        which X(N) finish in a second. So N is the fewest for which X(N) reaches the rate; the prediction is for whole
        sequences of a dp group. A layout that cannot reach the rate is predicted with its cache full.
        """
        if not self.fits:
            return RatedLayout(self.at(1), rate, 0.0, 0.0, 0.0)
        within = self.most_within_limits()
        most = self.requests_per_s(within) if within else 0.0
        capacity = max(most, self.requests_per_s(self.largest))
        bound = within if most >= rate else self.largest
        sequences = min(bound, 1 + last(bound, lambda tried: self.requests_per_s(tried) < rate))
        served = min(rate, self.requests_per_s(sequences))
        in_flight = served * sequences * self.groups / self.requests_per_s(sequences)
        tokens = served * self.request.output_len
        planned = replace(
            self.at(sequences), tokens_per_s=tokens, tokens_per_s_per_gpu=tokens / self.cluster.num_devices
        )
        return RatedLayout(planned, rate, in_flight, most, capacity)

    def _largest(self) -> int:
        """The most sequences of a dp group that fit into its cache and into a step."""
        dp = self.layout.dp
        return largest_that_fits(
            min(self.at(1).max_batch // dp, self.request.max_num_batched_tokens),
            lambda sequences: self.at(sequences).max_batch // dp,
        )


def largest_that_fits(most: int, fitting: Callable[[int], int]) -> int:
    """The most sequences, at most `most`, that fit beside their own activations. `fitting(n)` sequences fit beside
    activations of n, which is less the larger n is."""
    if most < 1 or fitting(most) >= most:
        return max(0, most)
    least = max(0, fitting(most))
    return least + last(most - least, lambda more: fitting(least + more) >= least + more)


def last(most: int, holds: Callable[[int], bool]) -> int:
    """The largest number from 1 to `most` for which `holds`, which holds up to some number and not beyond; 0 if it
    never does. Asks about log2(most) times, first near 1."""
    low, high = 0, 1
    while high <= most and holds(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
