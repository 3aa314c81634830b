"""Passes snapshots on to Ray's metrics, whose agent on each node Ray's dashboards and autoscaling policies read.

Ray's agent exposes the metric `vllm:x` as `ray_vllm_x`, with the labels of the process beside its own.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from ray.util import metrics as ray_metrics

from serve_app.metrics.definitions import DEFINITIONS, Definition
from serve_app.metrics.values import HistogramCounts, Labels, Snapshot

logger = logging.getLogger("ray.serve")
PUSH_EVERY_S = 1.0
# Ray takes observations one by one, at 3 to 4 us each. Of more than this number in a push, a proportional sample is
# passed on, so quantiles and means hold and the count does not.
MOST_OBSERVATIONS = 300


class RayExport:
    """Pushes what changed since the last push. Ray's metrics come into being with their first value."""

    def __init__(self) -> None:
        self._prefix = ""
        self._metrics: dict[str, Any] = {}
        self._pushed: dict[tuple[str, Labels], float | tuple[int, ...]] = {}

    def push(self, snapshot: Snapshot) -> None:
        """Takes at most about a millisecond for each histogram; call it from a thread. The prefix must stay."""
        self._prefix = snapshot.prefix
        for definition in DEFINITIONS:
            for labels, value in snapshot.values.get(definition.name, {}).items():
                tags = {**snapshot.labels, **dict(zip(definition.labels, labels, strict=True))}
                if isinstance(value, HistogramCounts):
                    self._push_histogram(definition, labels, value.counts, tags)
                elif definition.kind == "gauge":
                    self._metric(definition, tags).set(value, tags)
                else:
                    before = self._pushed.get((definition.name, labels), 0.0)
                    assert isinstance(before, float)
                    if value > before:
                        self._metric(definition, tags).inc(value - before, tags)
                        self._pushed[definition.name, labels] = float(value)

    def _push_histogram(
        self, definition: Definition, labels: Labels, counts: tuple[int, ...], tags: Mapping[str, str]
    ) -> None:
        before = self._pushed.get((definition.name, labels), (0,) * len(counts))
        assert isinstance(before, tuple)
        new = [now - then for now, then in zip(counts, before, strict=True)]
        if not any(new):
            return
        self._pushed[definition.name, labels] = counts
        metric = self._metric(definition, tags)
        for value, times in zip(middles(definition.buckets), sampled(new, MOST_OBSERVATIONS), strict=True):
            for _ in range(times):
                metric.observe(value, tags)

    def _metric(self, definition: Definition, tags: Mapping[str, str]) -> Any:
        if definition.name not in self._metrics:
            name, keys = definition.full_name(self._prefix, "_"), tuple(tags)
            make: dict[str, Callable[[], Any]] = {
                "counter": lambda: ray_metrics.Counter(name, definition.help, keys),
                "gauge": lambda: ray_metrics.Gauge(name, definition.help, keys),
                "histogram": lambda: ray_metrics.Histogram(
                    name, definition.help, list(definition.buckets), keys
                ),
            }
            self._metrics[definition.name] = make[definition.kind]()
        return self._metrics[definition.name]


def middles(bounds: tuple[float, ...]) -> list[float]:
    """A value inside each bucket. Ray's agent too counts an observation as its bucket's middle."""
    inner = [(low + high) / 2 for low, high in zip((0.0, *bounds), bounds, strict=False)]
    return [*inner, bounds[-1] * 1.01]


def sampled(counts: list[int], most: int) -> list[int]:
    """`counts` scaled down to about `most` together, no bucket to nothing; unchanged if they are no more."""
    share = min(1.0, most / (sum(counts) or 1))
    return [math.ceil(count * share) for count in counts]


class RayPush:
    """A task of the running event loop that pushes what `read` returns to Ray every second."""

    def __init__(self, read: Callable[[], Awaitable[Snapshot]]) -> None:
        self._read = read
        self._export = RayExport()
        self._task = asyncio.create_task(self._run())

    def stop(self) -> None:
        """Ends the task."""
        self._task.cancel()

    async def _run(self) -> None:
        fails = False
        while True:
            await asyncio.sleep(PUSH_EVERY_S)
            try:
                await asyncio.to_thread(self._export.push, await self._read())
                fails = False
            except Exception as error:  # the next push may succeed, and it includes what this one missed
                if isinstance(error, RuntimeError) and "after shutdown" in str(error):
                    return  # of the loop's threads: the process ends
                if not fails:
                    logger.exception("metrics cannot be passed on to Ray; trying again every second")
                fails = True
