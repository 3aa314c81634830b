"""Reports of a sweep: tables and charts of measured figures, predictions and their errors."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from cluster.hardware import Cluster
from cluster.planning.burst import BurstFigures, predict_burst
from cluster.planning.cost_model import CostModel
from cluster.planning.plots import can_plot, plot_bars, plot_errors
from cluster.sweep.run import SweepWorkload
from qwen3_dist.config import ModelConfig
from qwen3_dist.layout import Layout
from qwen3_dist.step_defaults import STEP_DEFAULTS

FIGURES = ("output_tokens_per_s", "ttft_ms", "itl_ms")


@dataclass(frozen=True)
class Row:
    """Figures of one layout at one point. A layout that failed has a single row with its error and no figures."""

    layout: str
    point: str
    measured: dict[str, float | None]
    predicted: dict[str, float | None]
    error: str = ""

    def error_of(self, figure: str) -> float | None:
        """Relative error of the prediction: predicted / measured - 1; None if either is missing."""
        measured, predicted = self.measured.get(figure), self.predicted.get(figure)
        return predicted / measured - 1 if measured and predicted else None


def make_rows(
    results: Iterable[tuple[Layout, dict[str, Any]]],
    config: ModelConfig,
    workload: SweepWorkload,
    cluster: Cluster | None,
) -> list[Row]:
    """The rows of the table, with predictions if `cluster` is given.

    Predictions assume even routing (expert imbalance 1), as random weights give it.
    """
    rows = []
    for layout, result in results:
        if "error" in result:
            rows.append(Row(str(layout), "", {}, {}, result["error"]))
            continue
        for point, found in zip(workload.points, result["points"], strict=True):
            measured = {
                "output_tokens_per_s": found["output_tokens_per_s"],
                "ttft_ms": found["ttft_ms"]["p50"],
                "itl_ms": found["itl_ms"]["p50"] if found["itl_ms"] else None,
            }
            predicted: dict[str, float | None] = {}
            if cluster is not None:
                predicted = vars(predict(CostModel(config, layout, cluster, 1.0), workload, point))
            rows.append(Row(str(layout), str(point), measured, predicted))
    return rows


def predict(model: CostModel, workload: SweepWorkload, point: Any) -> BurstFigures:
    """Predicted figures of the point, with the engine's default step limits for the device."""
    defaults = STEP_DEFAULTS[model.cluster.device_kind]
    tokens = workload.max_num_batched_tokens or defaults.max_num_batched_tokens
    return predict_burst(model, point, tokens, defaults.max_num_seqs)


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
    right, pairs = order_agreement(rows, "output_tokens_per_s")
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
    predicted = any(row.predicted for row in rows)
    cells = [_cells(row, predicted) for row in rows]
    header = _header(predicted)
    files = [folder / "table.md", folder / "table.csv"]
    lines = [f"# {title}", "", _line(header), _line(["---"] * len(header)), *map(_line, cells)]
    lines += ["", *(f"- {line}" for line in summary(rows))] if predicted else []
    files[0].write_text("\n".join(lines) + "\n")
    with files[1].open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(cells)
    return files + (_charts(folder, title, rows) if can_plot() else [])


def _charts(folder: Path, title: str, rows: Sequence[Row]) -> list[Path]:
    files = []
    for number, point in enumerate(dict.fromkeys(row.point for row in rows if row.point), 1):
        bars = [
            (row.layout, row.measured["output_tokens_per_s"] or 0.0) for row in rows if row.point == point
        ]
        files.append(folder / f"throughput-{number}.png")
        plot_bars(files[-1], f"{title}: {point}", "output tokens/s", bars)
    for figure in FIGURES:
        known = [row for row in rows if row.error_of(figure) is not None]
        if known:
            files.append(folder / f"predicted-{figure}.png")
            points = [(row.layout, row.measured[figure] or 0, row.predicted[figure] or 0) for row in known]
            plot_errors(files[-1], f"{title}: {figure}", points)
    return files


def _header(predicted: bool) -> list[str]:
    names = ["layout", "point"]
    for figure in FIGURES:
        names += [figure, f"{figure} predicted", f"{figure} error"] if predicted else [figure]
    return [*names, "failure"]


def _cells(row: Row, predicted: bool) -> list[str]:
    cells = [row.layout, row.point]
    for figure in FIGURES:
        cells.append(_number(row.measured.get(figure)))
        if predicted:
            error = row.error_of(figure)
            cells += [_number(row.predicted.get(figure)), "" if error is None else f"{error:+.1%}"]
    return [*cells, row.error]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
