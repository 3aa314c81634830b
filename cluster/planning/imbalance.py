"""How far the busiest of several ranks lies above the mean, by chance."""

from __future__ import annotations

from statistics import NormalDist


def largest_of(ranks: int) -> float:
    """Expected maximum of `ranks` standard normal values: how far the busiest rank lies above the mean.

    Blom's estimate (1958). The loads of ranks add up to a constant, which reduces each deviation but raises the
    maximum; the two effects cancel.
    """
    return NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25)) if ranks > 1 else 0.0
