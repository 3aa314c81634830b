"""Charts as PNG files. Needs matplotlib (`pip install qwen3-dist[plots]`), but no display."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cluster.planning.planner import PlannedLayout, pareto_frontier
from qwen3_dist.errors import ConfigError

_OTHERS, _BEST = "#9aa5b1", "#c2410c"
_MOST_NAMED = 4  # of points with errors
_NAME_WIDTH, _NAME_HEIGHT = 130.0, 9.0  # room of a name, in points
Named = tuple[str, float, float]  # a name, x and y


def require_matplotlib() -> None:
    """Raises ConfigError if matplotlib is not installed."""
    if not can_plot():
        raise ConfigError("plots need matplotlib; pip install 'qwen3-dist[plots]', or leave --plot out")


def can_plot() -> bool:
    return find_spec("matplotlib") is not None


def plot_plan(file: Path, title: str, planned: Sequence[PlannedLayout]) -> None:
    """Throughput per GPU over speed per user, for every layout and load, with a labelled Pareto frontier."""
    figure, axes = _axes(title, "tokens/s per user", "tokens/s per GPU")
    fitting = [one for one in planned if one.fits and one.itl_ms]
    frontier = pareto_frontier(list(planned))
    axes.scatter(*_points(fitting), s=8, color=_OTHERS, label="layouts at all concurrencies")
    axes.plot(*_points(frontier), marker="o", color=_BEST, label="Pareto frontier")
    labelled = ""
    for one in frontier:
        if str(one.layout) != labelled:  # label each layout once, where the frontier reaches it
            labelled = str(one.layout)
            text = f"{labelled} at {one.concurrency}"
            point = (one.tokens_per_s_per_user, one.tokens_per_s_per_gpu)
            axes.annotate(text, point, xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.set_xlim(left=0, right=1.2 * max((one.tokens_per_s_per_user for one in fitting), default=1.0))
    axes.legend()
    _save(figure, file)


def plot_frontier(
    file: Path, title: str, points: Sequence[Named], frontier: Sequence[Named], unit: str = "rank"
) -> None:
    """Measured throughput over speed of a user for (name, speed, throughput), with a labelled Pareto frontier."""
    figure, axes = _axes(title, "tokens/s of a user", f"output tokens/s of a {unit}")
    axes.scatter(*_columns(points), s=12, color=_OTHERS, label="all layouts and loads")
    axes.plot(*_columns(frontier), marker="o", color=_BEST, label="Pareto frontier")
    axes.set_xlim(left=0, right=1.35 * max(speed for _, speed, _ in points))
    top = 1.1 * max(rate for _, _, rate in points)
    axes.set_ylim(bottom=-0.05 * top, top=top)
    _label(axes, frontier)
    axes.legend(loc="lower left")
    _save(figure, file)


def plot_efficiency(file: Path, title: str, lines: Mapping[str, Sequence[tuple[int, float, str]]]) -> None:
    """Throughput of a rank over the number of ranks, as a share of that of the fewest, a line for each name. A single
    line has the names of its points."""
    figure, axes = _axes(title, "ranks", "throughput of a rank, as a share of that of the fewest ranks")
    axes.axhline(1.0, color=_OTHERS, linestyle="--", label="perfect scaling")
    worlds = sorted({world for points in lines.values() for world, _, _ in points})
    for name, points in lines.items():
        axes.plot(
            [world for world, _, _ in points], [share for _, share, _ in points], marker="o", label=name
        )
        if len(lines) == 1:
            _label(axes, [(layout, world, share) for world, share, layout in points])
    axes.set_xscale("log", base=2)
    axes.set_xticks(worlds, [str(world) for world in worlds])
    axes.set_xlim(right=1.5 * worlds[-1])
    axes.set_ylim(bottom=0)
    for points in lines.values() if len(lines) == 1 else ():
        _label(axes, [(layout, world, share) for world, share, layout in points])
    axes.legend(fontsize=8, loc="lower left")
    _save(figure, file)


def plot_errors(file: Path, title: str, points: Sequence[Named]) -> None:
    """Predicted over measured values for `points` of (name, measured, predicted), with the diagonal of no error.

    Those with the largest errors are named. The band is 20% below and 25% above."""
    figure, axes = _axes(title, "measured", "predicted")
    values = [value for _, *pair in points for value in pair]
    ends = (min(values) * 0.8, max(values) * 1.25)
    axes.plot(ends, ends, color=_OTHERS, label="no error")
    axes.fill_between(
        ends, [0.8 * end for end in ends], [1.25 * end for end in ends], alpha=0.15, color=_OTHERS
    )
    worst = sorted(points, key=lambda point: -abs(math.log(point[2] / point[1])))[:_MOST_NAMED]
    others = [point for point in points if point not in worst]
    axes.set_xscale("log")
    axes.set_yscale("log")
    if others:
        axes.scatter(*_columns(others), s=14, color=_OTHERS)
    axes.scatter(*_columns(worst), s=24, color=_BEST, label="largest errors")
    axes.set_xlim(ends)
    axes.set_ylim(ends)
    _label(axes, worst)
    axes.legend(fontsize=8)
    _save(figure, file)


def plot_bars(file: Path, title: str, label: str, bars: Sequence[tuple[str, float]]) -> None:
    """A horizontal bar for each (name, value), the longest first."""
    figure, axes = _axes(title, label, "", height=max(6.0, 0.22 * len(bars)))
    upwards = sorted(bars, key=lambda bar: bar[1])
    axes.barh([name for name, _ in upwards], [value for _, value in upwards], color=_BEST)
    axes.margins(y=0.01)
    _save(figure, file)


def plot_stacked(
    file: Path, title: str, x: str, y: str, times: Sequence[float], series: Mapping[str, Sequence[float]]
) -> None:
    """Stacked step chart of named counts over time."""
    figure, axes = _axes(title, x, y)
    axes.stackplot(times, *series.values(), labels=list(series), step="post", alpha=0.8)
    axes.legend(loc="upper left")
    _save(figure, file)


def _axes(title: str, x: str, y: str, height: float = 6.0) -> tuple[Any, Any]:
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def _columns(points: Sequence[Named]) -> tuple[list[float], list[float]]:
    return [x for _, x, _ in points], [y for _, _, y in points]


def _label(axes: Any, points: Sequence[Named]) -> None:
    """Names points to their right, and lower where another name would be in the way. The axes' limits must be set."""
    scale = 72 / axes.figure.dpi  # points of a pixel
    taken: list[tuple[float, float]] = []
    for name, x, y in sorted(points, key=lambda point: -point[2]):
        left, own = (scale * each for each in axes.transData.transform((x, y)))
        height = own + 4
        for other, below in sorted(taken, key=lambda place: -place[1]):
            if abs(left - other) < _NAME_WIDTH and abs(height - below) < _NAME_HEIGHT:
                height = below - _NAME_HEIGHT
        taken.append((left, height))
        moved = abs(height - own) > _NAME_HEIGHT
        line = {"arrowstyle": "-", "color": _OTHERS, "linewidth": 0.6} if moved else None
        offset = (14 if moved else 6, height - own)
        axes.annotate(name, (x, y), xytext=offset, textcoords="offset points", fontsize=7, arrowprops=line)


def _points(planned: Sequence[PlannedLayout]) -> tuple[list[float], list[float]]:
    return (
        [one.tokens_per_s_per_user for one in planned],
        [one.tokens_per_s_per_gpu or 0.0 for one in planned],
    )


def _save(figure: Any, file: Path) -> None:
    try:
        figure.savefig(file, dpi=120)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written ({error.strerror}); choose another path") from None
    except ValueError as error:
        raise ConfigError(f"{file} cannot be written ({error}); give the path of a .png file") from None
