"""Reports of a sweep: tables and charts of measured figures, predictions and their errors."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from cluster.planning.plots import can_plot
from cluster.sweep.charts import write_charts
from cluster.sweep.rows import FIGURES, THROUGHPUT, Row


def summary(rows: Sequence[Row]) -> list[str]:
    """Sentences on the prediction errors, and on how often the predicted order of two layouts is right."""
    lines = []
    for figure in FIGURES:
        errors = [abs(error) for row in rows if (error := row.error_of(figure)) is not None]
        if errors:
            lines.append(
                f"{figure}: median error {statistics.median(errors):.1%}, largest {max(errors):.1%}, "
                f"of {len(errors)} rows"
            )
    right, pairs = order_agreement(rows, THROUGHPUT)
    if pairs:
        lines.append(f"predicted order right for {right} of {pairs} pairs of layouts at the same point")
    return lines


def order_agreement(rows: Sequence[Row], figure: str) -> tuple[int, int]:
    """The number of pairs of layouts, at the same point, whose predicted order is right, and the number of all
    pairs."""
    right = pairs = 0
    for one, other in combinations([row for row in rows if row.error_of(figure) is not None], 2):
        if one.point == other.point:
            measured = (one.measured[figure] or 0) - (other.measured[figure] or 0)
            predicted = (one.predicted[figure] or 0) - (other.predicted[figure] or 0)
            pairs += 1
            right += measured * predicted > 0 or measured == predicted
    return right, pairs


def write_report(folder: Path, title: str, rows: Sequence[Row]) -> list[Path]:
    """Writes table.md, table.csv and, if matplotlib is installed, charts to `folder`. Returns the files."""
    predicted, repeated = any(row.predicted for row in rows), any(row.ranges for row in rows)
    cells = [_cells(row, predicted, repeated) for row in rows]
    header = _header(predicted, repeated)
    files = [folder / "table.md", folder / "table.csv"]
    lines = [f"# {title}", "", _line(header), _line(["---"] * len(header)), *map(_line, cells)]
    lines += ["", *(f"- {line}" for line in summary(rows))] if predicted else []
    files[0].write_text("\n".join(lines) + "\n")
    with files[1].open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(cells)
    return files + (write_charts(folder, title, rows) if can_plot() else [])


def _header(predicted: bool, repeated: bool) -> list[str]:
    names = ["layout", "point"]
    for figure in FIGURES:
        names += [figure, *([f"{figure} range"] if repeated else [])]
        names += [f"{figure} predicted", f"{figure} error"] if predicted else []
    return [*names, "failure"]


def _cells(row: Row, predicted: bool, repeated: bool) -> list[str]:
    cells = [row.layout, row.point]
    for figure in FIGURES:
        cells.append(_number(row.measured.get(figure)))
        if repeated:
            cells.append("-".join(map(_number, row.ranges.get(figure, ()))))
        if predicted:
            error = row.error_of(figure)
            cells += [_number(row.predicted.get(figure)), "" if error is None else f"{error:+.1%}"]
    return [*cells, row.error]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
