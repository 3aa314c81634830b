"""Values of metrics while they are recorded, cheap enough to be recorded for every token."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from serve_app.metrics.definitions import VLLM_PREFIX, Definition

Labels = tuple[str, ...]  # values of a definition's labels, in its order


class HistogramCounts(NamedTuple):
    """Observations in each bucket, the last one without an upper bound, and their sum."""

    counts: tuple[int, ...]
    sum: float


@dataclass(frozen=True)
class Snapshot:
    """The values of one process by metric name and labels. `labels` are those that all of them have, and `prefix`
    begins the names of those that vLLM has."""

    labels: Mapping[str, str]
    values: Mapping[str, Mapping[Labels, float | HistogramCounts]]
    prefix: str = VLLM_PREFIX


class Histogram:
    """Counts observations by bucket. An observation takes about a third of a microsecond."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Counts `value` so many times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def read(self) -> HistogramCounts:
        return HistogramCounts(tuple(self._counts), self._sum)


class Values:
    """The metrics of one process. Used from one thread."""

    def __init__(self) -> None:
        self._numbers: dict[str, dict[Labels, float]] = defaultdict(dict)
        self._histograms: dict[str, dict[Labels, Histogram]] = defaultdict(dict)

    def add(self, definition: Definition, amount: float, *labels: str) -> None:
        """Adds to a counter or a gauge."""
        numbers = self._numbers[definition.name]
        numbers[labels] = numbers.get(labels, 0.0) + amount

    def set(self, definition: Definition, value: float, *labels: str) -> None:
        """Sets a gauge, or a counter that is counted elsewhere."""
        self._numbers[definition.name][labels] = value

    def forget(self, definition: Definition) -> None:
        """Removes all values of a gauge whose labels change."""
        self._numbers[definition.name].clear()

    def histogram(self, definition: Definition) -> Histogram:
        """The histogram of `definition`, which has no labels of its own."""
        return self._histograms[definition.name].setdefault((), Histogram(definition.buckets))

    def snapshot(self, labels: Mapping[str, str], prefix: str = VLLM_PREFIX) -> Snapshot:
        """All values now, for a process whose metrics have these `labels`."""
        values: dict[str, Mapping[Labels, float | HistogramCounts]] = {
            name: dict(numbers) for name, numbers in self._numbers.items()
        }
        for name, histograms in self._histograms.items():
            values[name] = {key: histogram.read() for key, histogram in histograms.items()}
        return Snapshot(labels, values, prefix)
