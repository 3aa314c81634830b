"""The order of layouts: predictions that hardly differ are ties, of which the simplest layout is the best."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import takewhile
from typing import TypeVar

from qwen3_dist.layout import Layout

T = TypeVar("T")
TIE = 0.02  # of the higher rate; predictions are off by more (`expected_errors.py`)


def complexity(layout: Layout) -> tuple[int, ...]:
    """Smaller is simpler: fewer kinds of parallelism, then fewer pipeline stages, then fewer ranks."""
    kinds = sum(size > 1 for size in (layout.tp, layout.dp, layout.pp, layout.ep))
    return kinds, layout.pp, layout.world


def ranked(
    found: Iterable[T],
    layout: Callable[[T], Layout],
    rate: Callable[[T], float],
    last: Callable[[T], tuple[bool, ...]] = lambda _: (),
) -> list[T]:
    """`found` by `rate`, the highest first; but of those within `TIE` of the highest the simplest comes before all,
    and of equally simple ones that of the highest rate. What `last` is true of comes after all others."""
    order = sorted(found, key=lambda one: (last(one), -rate(one), complexity(layout(one))))
    if order:
        first, least = last(order[0]), (1 - TIE) * rate(order[0])
        tied = takewhile(lambda one: last(one) == first and rate(one) >= least, order)
        best = min(tied, key=lambda one: complexity(layout(one)))
        order.remove(best)
        order.insert(0, best)
    return order
