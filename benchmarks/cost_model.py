"""Predicted against measured step times on this machine, for layouts of a dense and a MoE model.

    python -m benchmarks.cost_model [--hardware FILE.yaml] [--layouts "tp=1;tp=2"]

Calibrates first, unless --hardware is given. The machine must be idle. Models have real shapes and random weights; a
layout that cannot run is listed with its error. Decode steps are measured as the median ITL, prefill steps as TTFT.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.compare.checkpoints import SHAPES
from benchmarks.record import run_info, write
from cluster.calibration.calibrate import calibrate
from cluster.hardware import Cluster, as_dict, read_cluster
from cluster.sweep.report import order_agreement
from cluster.sweep.rows import Row, make_rows
from cluster.sweep.run import SweepFolder, SweepPoint, SweepWorkload, run_sweep
from qwen3_dist.config import ModelConfig
from qwen3_dist.layout import Layout

POINTS = (SweepPoint(1, 32, 16), SweepPoint(8, 32, 16), SweepPoint(16, 64, 12), SweepPoint(1, 512, 4))
LAYOUTS = {
    "dense": ("tp=1", "tp=2", "dp=2", "pp=2"),
    "moe": ("tp=1", "tp=2", "tp=2,ep=2", "dp=2,ep=2", "pp=2"),
}
STEPS = ("itl_ms", "ttft_ms")


def run(kind: str, layouts: list[Layout], cluster: Cluster, folder: Path) -> list[Row]:
    """The rows of one model."""
    model = folder / kind
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SHAPES[kind]))
    workload = SweepWorkload(POINTS, device="cpu", timeout_s=900)
    swept = SweepFolder(folder / f"{kind}-sweep", kind, workload)
    fitting = [layout for layout in layouts if layout.fits(ModelConfig.from_dict(SHAPES[kind]))]
    results = list(run_sweep(swept, fitting, model, True, workload, print))
    return make_rows(results, ModelConfig.from_dict(SHAPES[kind]), workload, cluster)


def as_json(kind: str, row: Row) -> dict[str, Any]:
    if row.error:
        return {"model": kind, "layout": row.layout, "failed": row.error}
    found: dict[str, Any] = {"model": kind, "layout": row.layout, "point": row.point}
    for figure in ("output_tokens_per_s", *STEPS):
        error = row.error_of(figure)
        if error is not None:
            predicted = row.predicted[figure]
            assert predicted is not None
            found[figure] = {
                "measured": row.measured[figure],
                "predicted": round(predicted, 2),
                "error": round(error, 3),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="predicted against measured steps on this machine")
    parser.add_argument("--hardware", type=Path, help="cluster file to use instead of calibrating")
    parser.add_argument("--layouts", help="layouts to run, separated by ;")
    options = parser.parse_args()
    others: float | None = None
    if options.hardware:
        cluster = read_cluster(options.hardware)
    else:
        calibration = calibrate("cpu", print)
        cluster, others = calibration.cluster, calibration.about["cpu_share_of_others"]
    asked = options.layouts.split(";") if options.layouts else None
    rows: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, names in LAYOUTS.items():
            layouts = [Layout.parse(name) for name in asked or names]
            rows[kind] = run(kind, layouts, cluster, Path(folder))
    result: dict[str, Any] = {
        "cpu_share_of_others": others,
        "cluster": as_dict(cluster),
        "summary": {},
    }
    for figure in (*STEPS, "output_tokens_per_s"):
        errors = [
            abs(e) for found in rows.values() for row in found if (e := row.error_of(figure)) is not None
        ]
        if errors:
            result["summary"][figure] = {
                "rows": len(errors),
                "median_error": round(statistics.median(errors), 3),
                "largest_error": round(max(errors), 3),
            }
    orders = {kind: order_agreement(found, "output_tokens_per_s") for kind, found in rows.items()}
    result["summary"]["pairs_in_predicted_order"] = {k: f"{right} of {n}" for k, (right, n) in orders.items()}
    result["rows"] = [as_json(kind, row) for kind, found in rows.items() for row in found]
    for row in result["rows"]:
        print(json.dumps(row))
    print(json.dumps(result["summary"], indent=1))
    write("cost-model", run_info(), result)


if __name__ == "__main__":
    main()
