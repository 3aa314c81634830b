"""What a sweep found, as rows of a table: medians of measured figures, their ranges, and predictions."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.hardware import Cluster
from cluster.planning.burst import BurstFigures, predict_burst
from cluster.planning.cost_model import CostModel
from cluster.sweep.run import SweepPoint, SweepWorkload
from qwen3_dist.config import ModelConfig
from qwen3_dist.layout import Layout
from qwen3_dist.step_defaults import STEP_DEFAULTS

THROUGHPUT = "output_tokens_per_s"
FIGURES = (THROUGHPUT, "ttft_ms", "ttft_p90_ms", "itl_ms")
Range = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """Figures of one layout at one point: the medians of its repeats, and their ranges where there are several.

    A layout that failed has a single row with its error and no figures."""

    layout: str
    point: str
    measured: dict[str, float | None]
    predicted: dict[str, float | None]
    error: str = ""
    ranges: dict[str, Range] = field(default_factory=dict)

    @property
    def world(self) -> int:
        return Layout.parse(self.layout).world

    @property
    def shape(self) -> str:
        """The lengths of the point's prompts and outputs; loads of one shape can be compared."""
        match = re.search(r"\((.*)\)", self.point)
        return match[1] if match else ""

    @property
    def tokens_per_s_per_rank(self) -> float:
        return (self.measured.get(THROUGHPUT) or 0.0) / self.world

    @property
    def user_speed(self) -> float | None:
        """Tokens per second of one request while it decodes."""
        itl_ms = self.measured.get("itl_ms")
        return 1e3 / itl_ms if itl_ms else None

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
            repeats = [_figures(each) for each in found["repeats"]]
            predicted: dict[str, float | None] = {}
            if cluster is not None:
                predicted = vars(predict(CostModel(config, layout, cluster, 1.0), workload, point))
            rows.append(Row(str(layout), str(point), _medians(repeats), predicted, "", _ranges(repeats)))
    return rows


def _figures(repeat: dict[str, Any]) -> dict[str, float | None]:
    """The figures of one run: throughput, and percentiles of TTFT and ITL."""
    itl = repeat["itl_ms"]
    return {
        THROUGHPUT: repeat[THROUGHPUT],
        "ttft_ms": repeat["ttft_ms"]["p50"],
        "ttft_p90_ms": repeat["ttft_ms"]["p90"],
        "itl_ms": itl["p50"] if itl else None,
    }


def _medians(repeats: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    known = {name: [each[name] for each in repeats if each[name] is not None] for name in FIGURES}
    return {name: statistics.median(values) if values else None for name, values in known.items()}  # type: ignore[type-var]


def _ranges(repeats: Sequence[dict[str, float | None]]) -> dict[str, Range]:
    if len(repeats) < 2:
        return {}
    known = {name: [value for each in repeats if (value := each[name]) is not None] for name in FIGURES}
    return {name: (min(values), max(values)) for name, values in known.items() if values}


def predict(model: CostModel, workload: SweepWorkload, point: SweepPoint) -> BurstFigures:
    """Predicted figures of the point's first repeat, with the engine's default step limits for the device."""
    defaults = STEP_DEFAULTS[model.cluster.device_kind]
    tokens = workload.max_num_batched_tokens or defaults.max_num_batched_tokens
    return predict_burst(model, point, tokens, defaults.max_num_seqs, point.arrivals_s(seed=0))
