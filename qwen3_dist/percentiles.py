"""Percentiles with linear interpolation, as numpy's default. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

PERCENTS = (50, 90, 99)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The percentile of sorted, non-empty `ordered`."""
    low, share = _position(percent, len(ordered))
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + share * (ordered[high] - ordered[low])


def percentiles(values: Sequence[float], scale: float = 1.0) -> dict[str, float] | None:
    """p50, p90 and p99 of `scale` times the values; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    return {f"p{percent}": round(scale * percentile(ordered, percent), 3) for percent in PERCENTS}


def weighted_percentiles(counts: Mapping[int, int], scale: float = 1.0) -> dict[str, float] | None:
    """`percentiles` of the keys of `counts`, where each key occurs as often as its value says."""
    total = sum(counts.values())
    if not total:
        return None
    ordered = sorted(counts.items())
    result = {}
    for percent in PERCENTS:
        low, share = _position(percent, total)
        below, above = (_at_rank(ordered, rank) for rank in (low, min(low + 1, total - 1)))
        result[f"p{percent}"] = round(scale * (below + share * (above - below)), 3)
    return result


def _position(percent: float, count: int) -> tuple[int, float]:
    """The index of the sample below the percentile, and the fraction of the way to the next sample."""
    position = percent / 100 * (count - 1)
    return math.floor(position), position - math.floor(position)


def _at_rank(ordered: Sequence[tuple[int, int]], rank: int) -> int:
    for value, count in ordered:
        rank -= count
        if rank < 0:
            return value
    raise AssertionError("a rank below the total is found")
