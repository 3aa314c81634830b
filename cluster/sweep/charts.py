"""Charts of a sweep, which stay readable with many layouts: only those that matter are named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cluster.planning.plots import plot_bars, plot_efficiency, plot_errors, plot_frontier
from cluster.sweep.rows import FIGURES, THROUGHPUT, Row


def write_charts(folder: Path, title: str, rows: Sequence[Row]) -> list[Path]:
    """Writes the charts to `folder` and returns their files. Those that have nothing to show are left out."""
    measured = [row for row in rows if row.point]
    files: list[Path] = []
    for number, shape in enumerate(dict.fromkeys(row.shape for row in measured), 1):
        of_shape = [row for row in measured if row.shape == shape and row.user_speed]
        if of_shape:
            files.append(folder / f"frontier-{number}.png")
            _frontier(files[-1], f"{title}: {shape}", of_shape)
    for number, point in enumerate(dict.fromkeys(row.point for row in measured), 1):
        bars = [(row.layout, row.measured[THROUGHPUT] or 0.0) for row in measured if row.point == point]
        files.append(folder / f"throughput-{number}.png")
        plot_bars(files[-1], f"{title}: {point}", "output tokens/s", bars)
    if lines := efficiency(measured):
        files.append(folder / "scaling.png")
        plot_efficiency(files[-1], f"{title}: best layout of each number of ranks", lines)
    for figure in FIGURES:
        known = [row for row in measured if row.error_of(figure) is not None]
        if known:
            files.append(folder / f"predicted-{figure}.png")
            points = [
                (f"{row.layout} {row.point}", row.measured[figure] or 0, row.predicted[figure] or 0)
                for row in known
            ]
            plot_errors(files[-1], f"{title}: {figure}", points)
    return files


def pareto_frontier(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other beats in both throughput per rank and speed of a user, the fastest for a user first."""
    frontier: list[Row] = []
    for row in sorted(rows, key=lambda row: (-(row.user_speed or 0.0), -row.tokens_per_s_per_rank)):
        if not frontier or row.tokens_per_s_per_rank > frontier[-1].tokens_per_s_per_rank:
            frontier.append(row)
    return frontier


def efficiency(rows: Sequence[Row]) -> dict[str, list[tuple[int, float, str]]]:
    """For each point, (ranks, share, layout): the best layout's throughput per rank as a share of that of the fewest
    ranks. Empty without layouts of different sizes. A point with a rate is left out: its throughput is the rate's."""
    lines: dict[str, list[tuple[int, float, str]]] = {}
    for point in dict.fromkeys(row.point for row in rows if " at " not in row.point):
        best: dict[int, Row] = {}
        for row in rows:
            other = best.get(row.world)
            if row.point == point and (
                other is None or row.tokens_per_s_per_rank > other.tokens_per_s_per_rank
            ):
                best[row.world] = row
        base = best[min(best)].tokens_per_s_per_rank
        if len(best) > 1 and base:
            lines[point] = [
                (world, row.tokens_per_s_per_rank / base, row.layout) for world, row in sorted(best.items())
            ]
    return lines


def _frontier(file: Path, title: str, rows: Sequence[Row]) -> None:
    def point(row: Row) -> tuple[str, float, float]:
        load = row.point.replace(f"×({row.shape})", "")
        return f"{row.layout}: {load}", row.user_speed or 0.0, row.tokens_per_s_per_rank

    plot_frontier(file, title, [point(row) for row in rows], [point(row) for row in pareto_frontier(rows)])
