"""Snapshots of several processes as one page in Prometheus's text format, which every scraper reads.

OpenMetrics is not offered: prometheus_client would write `vllm_x` for `vllm:x` there, and Prometheus prefers it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from serve_app.metrics.definitions import DEFINITIONS, Definition
from serve_app.metrics.values import HistogramCounts, Snapshot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Page(Collector):
    """The metrics of `snapshots`. Each sample has the labels of its process before those of its definition."""

    def __init__(self, snapshots: Sequence[Snapshot]) -> None:
        self._snapshots = snapshots

    def collect(self) -> Iterator[Metric]:
        for definition in DEFINITIONS:
            by_name: dict[str, list[Snapshot]] = {}
            for each in self._snapshots:
                if definition.name in each.values:
                    names = (definition.full_name(each.prefix), *definition.alias_names(each.prefix))
                    for name in names:
                        by_name.setdefault(name, []).append(each)
            for name, holders in by_name.items():
                yield self._family(name, definition, holders)

    @staticmethod
    def _family(name: str, definition: Definition, holders: Sequence[Snapshot]) -> Metric:
        families = {
            "counter": CounterMetricFamily,
            "gauge": GaugeMetricFamily,
            "histogram": HistogramMetricFamily,
        }
        common = list(dict.fromkeys(label for each in holders for label in each.labels))
        family = families[definition.kind](name, definition.help, labels=(*common, *definition.labels))
        for each in holders:
            mine = [each.labels.get(label, "") for label in common]
            for labels, value in each.values[definition.name].items():
                if isinstance(value, HistogramCounts):
                    bounds = [*map(floatToGoString, definition.buckets), "+Inf"]
                    buckets = list(zip(bounds, accumulate(value.counts), strict=True))
                    family.add_metric([*mine, *labels], buckets, value.sum)
                else:
                    family.add_metric([*mine, *labels], value)
        return family


def render(snapshots: Sequence[Snapshot]) -> bytes:
    """The page, of CONTENT_TYPE."""
    return generate_latest(Page(snapshots))
