"""Charts as PNG files. Needs matplotlib (`pip install qwen3-dist[plots]`), but no display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cluster.planning.planner import PlannedLayout, pareto_frontier
from qwen3_dist.errors import ConfigError

_OTHERS, _BEST = "#9aa5b1", "#c2410c"


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


def plot_errors(file: Path, title: str, points: Sequence[tuple[str, float, float]]) -> None:
    """Predicted over measured values for `points` of (name, measured, predicted), with the diagonal of no error."""
    figure, axes = _axes(title, "measured", "predicted")
    values = [value for _, *pair in points for value in pair]
    ends = (min(values) * 0.8, max(values) * 1.25)
    axes.plot(ends, ends, color=_OTHERS, label="no error")
    for layout in dict.fromkeys(name for name, _, _ in points):
        of_layout = [pair for name, *pair in points if name == layout]
        axes.scatter(*zip(*of_layout, strict=True), label=layout)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend(fontsize=8)
    _save(figure, file)


def plot_bars(file: Path, title: str, label: str, bars: Sequence[tuple[str, float]]) -> None:
    """A horizontal bar for each (name, value)."""
    figure, axes = _axes(title, label, "")
    names = [name for name, _ in bars]
    axes.barh(names[::-1], [value for _, value in bars][::-1], color=_BEST)
    _save(figure, file)


def plot_stacked(
    file: Path, title: str, x: str, y: str, times: Sequence[float], series: Mapping[str, Sequence[float]]
) -> None:
    """Stacked step chart of named counts over time."""
    figure, axes = _axes(title, x, y)
    axes.stackplot(times, *series.values(), labels=list(series), step="post", alpha=0.8)
    axes.legend(loc="upper left")
    _save(figure, file)


def _axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


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
