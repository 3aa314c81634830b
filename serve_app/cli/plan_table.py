"""The table that `qwen3-dist plan` prints: a row for each layout, and what its marks mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cluster.planning.ranking import TIE

if TYPE_CHECKING:
    from cluster.planning.layout_loads import RatedLayout
    from cluster.planning.planner import PlannedLayout, PlanRequest

_BEST = "*          best: most tokens/s/GPU among the layouts within --ttft-ms and --itl-ms"
_BEST_AT_RATE = "*          best: most requests/s within --ttft-ms and --itl-ms"
_TIED = "=          as fast as the best within the {:.0%} that predictions do not tell apart, but no simpler"
_LEGEND = (
    "replicas   engines of this layout that fill the cluster and share the load",
    "weights, KV, activations   memory of the fullest rank, with the KV cache that this load uses",
)
_MAX_BATCH = "max batch  sequences of this load that fit into the KV cache of one replica"
_RATE = (
    "in flight  requests in the service at this rate (Little's law)",
    "most req/s requests/s that it serves within its KV cache, --ttft-ms and --itl-ms",
)


def layout_lines(
    planned: Sequence[PlannedLayout], request: PlanRequest, show_all: bool, rated: Sequence[RatedLayout] = ()
) -> list[str]:
    """The table and its legend; nothing if no layout is shown. `rated` is in the order of `planned`, under a rate."""
    shown = [place for place, one in enumerate(planned) if show_all or one.fits]
    if not shown:
        return []
    rows = [_header(bool(rated))]
    marks = _marks(planned, request, rated)
    for place in shown:
        one = planned[place]
        load = _rate_cells(rated[place]) if rated else [str(one.max_batch) if one.fits else "-"]
        note = one.reason or (_too_little(rated[place]) if rated else _exceeded_limits(one, request))
        rows.append(_row(one, marks[place], load, note))
    best = _BEST_AT_RATE if rated else _BEST
    legend = [
        *_LEGEND,
        *(_RATE if rated else (_MAX_BATCH,)),
        load_line(request, rated[0].rate if rated else None),
    ]
    legend = [*([best] if "*" in marks else []), *([_TIED.format(TIE)] if "=" in marks else []), *legend]
    lines = [*aligned(rows, left=(0, 1, len(rows[0]) - 1)), "", *legend]
    if len(shown) < len(planned):
        lines.append(f"{len(planned) - len(shown)} layouts that do not fit are left out; --all lists them.")
    return lines


def _marks(planned: Sequence[PlannedLayout], request: PlanRequest, rated: Sequence[RatedLayout]) -> list[str]:
    """`*` for the best layout, `=` for what ties with it, if any is within the limits."""
    within = [one.holds for one in rated] or [one.meets_limits(request) for one in planned]
    rates = [one.most_per_s for one in rated] or [one.tokens_per_s_per_gpu or 0.0 for one in planned]
    most = max((rate for rate, holds in zip(rates, within, strict=True) if holds), default=0.0)
    tied = [
        "=" if holds and rate >= (1 - TIE) * most else "" for rate, holds in zip(rates, within, strict=True)
    ]
    return ["*" if within[0] else "", *tied[1:]]


def load_line(request: PlanRequest, rate: float | None) -> str:
    """What load the times are of, for a legend."""
    load = (
        f"{request.concurrency} requests in flight, each replaced when it ends (closed loop)"
        if rate is None
        else f"the steady state of {rate:g} requests/s, whenever others end (open loop)"
    )
    return f"TTFT, ITL  means with {load}"


def aligned(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Lines of `rows` with columns of equal width; those of `left` begin at the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def speed(value: float | None) -> str:
    """A cell of a figure that may be missing."""
    return "-" if value is None else f"{value:,.1f}"


def _header(rated: bool) -> list[str]:
    load = ["in flight", "most req/s"] if rated else ["max batch"]
    sizes = ["weights", "KV", "activations"]
    return [
        "",
        "layout",
        "ranks",
        "replicas",
        *sizes,
        *load,
        "TTFT ms",
        "ITL ms",
        "tokens/s",
        "tokens/s/GPU",
        "",
    ]


def _row(one: PlannedLayout, mark: str, load: list[str], note: str) -> list[str]:
    sizes = [f"{value / 1e9:.2f} GB" for value in one.bytes_per_rank.values()] or ["-"] * 3
    speeds = (one.ttft_ms, one.itl_ms, one.tokens_per_s, one.tokens_per_s_per_gpu)
    ranks = (str(one.layout.world), str(one.replicas))
    return [mark, str(one.layout), *ranks, *sizes, *load, *map(speed, speeds), note]


def _rate_cells(one: RatedLayout) -> list[str]:
    if not one.planned.fits:
        return ["-", "-"]
    return [f"{one.in_flight:,.1f}", f"{one.most_per_s:,.1f}"]


def _too_little(one: RatedLayout) -> str:
    if one.holds:
        return ""
    if not one.most_per_s:
        return "exceeds a limit at any rate"
    return f"{1 - one.most_per_s / one.rate:.0%} too little"


def _exceeded_limits(one: PlannedLayout, request: PlanRequest) -> str:
    limits = (("TTFT", one.ttft_ms, request.ttft_ms), ("ITL", one.itl_ms, request.itl_ms))
    return ", ".join(
        f"{name} over {limit:g} ms" for name, value, limit in limits if limit and value and value > limit
    )
