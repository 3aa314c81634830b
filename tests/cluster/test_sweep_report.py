"""What a sweep makes of its repeats: medians and ranges, open loops, charts that stay readable with 50 layouts."""

from __future__ import annotations

import csv
import random
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.planning import plots
from cluster.planning.burst import predict_burst
from cluster.planning.cost_model import CostModel
from cluster.sweep.charts import efficiency, pareto_frontier
from cluster.sweep.report import write_report
from cluster.sweep.rows import Row, make_rows
from cluster.sweep.run import Place, SweepFolder, SweepPoint, SweepWorkload
from qwen3_dist.arrival_times import arrival_times
from qwen3_dist.benchmark import Workload, measure
from qwen3_dist.engine.engine import Engine
from qwen3_dist.errors import ConfigError
from qwen3_dist.layout import Layout
from qwen3_dist.settings import EngineConfig
from tests.cluster.machines import DENSE, cluster


def repeat(rate: float, ttft_ms: float, itl_ms: float | None = None) -> dict[str, Any]:
    times = {"p50": ttft_ms, "p90": 2 * ttft_ms, "p99": 3 * ttft_ms}
    itl = {"p50": itl_ms, "p90": itl_ms, "p99": itl_ms} if itl_ms else None
    return {"output_tokens_per_s": rate, "ttft_ms": times, "itl_ms": itl}


def row(layout: str, point: str, rate: float, itl_ms: float) -> Row:
    return Row(layout, point, {"output_tokens_per_s": rate, "itl_ms": itl_ms}, {})


def test_the_median_of_repeats_counts_and_their_range_is_told(tmp_path: Path) -> None:
    workload = SweepWorkload((SweepPoint(2, 8, 4), SweepPoint(2, 8, 1, rate=2.5)), repeats=3)
    runs = [repeat(30, 5, 2), repeat(10, 9, 4), repeat(20, 6, 3)]
    result = {
        "points": [
            {"point": "", "repeats": runs},
            {"point": "", "repeats": [repeat(7, ttft) for ttft in (8, 4, 6)]},
        ]
    }
    first, second = make_rows([(Layout(), result)], DENSE, workload, None)
    assert first.measured == {"output_tokens_per_s": 20, "ttft_ms": 6, "ttft_p90_ms": 12, "itl_ms": 3}
    assert first.ranges["output_tokens_per_s"] == (10, 30) and first.ranges["itl_ms"] == (2, 4)
    assert second.measured["itl_ms"] is None and second.point == "2×(8→1) at 2.5/s"
    assert (first.shape, second.shape) == ("8→4", "8→1")
    write_report(tmp_path, "title", [first, second])
    with (tmp_path / "table.csv").open() as file:
        written = list(csv.DictReader(file))
    assert written[0]["ttft_ms range"] == "5.00-9.00" and written[1]["itl_ms range"] == ""
    once = make_rows(
        [(Layout(), {"points": [{"point": "", "repeats": runs[:1]}] * 2})], DENSE, workload, None
    )
    assert once[0].ranges == {} and once[0].measured["ttft_ms"] == 5


def test_the_frontier_has_what_nothing_beats_in_both() -> None:
    slow, fast = row("tp=1", "8×(9→9)", 900, 10), row("tp=2", "1×(9→9)", 400, 2)
    beaten, middle = row("dp=2", "8×(9→9)", 800, 10), row("pp=2", "4×(9→9)", 1200, 4)
    assert pareto_frontier([slow, beaten, fast, middle]) == [fast, middle, slow]


def test_scaling_is_that_of_the_best_layout_of_each_size() -> None:
    rows = [
        row("tp=1", "8×(9→9)", 100, 9),
        row("tp=2", "8×(9→9)", 150, 9),
        row("dp=2", "8×(9→9)", 180, 9),
        row("tp=4", "8×(9→9)", 200, 9),
        row("tp=1", "8×(9→9) at 5/s", 45, 9),
        row("tp=2", "8×(9→9) at 5/s", 45, 9),
    ]
    assert efficiency(rows) == {"8×(9→9)": [(1, 1.0, "tp=1"), (2, 0.9, "dp=2"), (4, 0.5, "tp=4")]}
    assert efficiency(rows[:1]) == {}


def test_charts_of_50_layouts_name_only_what_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    named: dict[str, list[str]] = {}

    def keep(figure: Any, file: Path) -> None:  # drawing takes seconds
        named[file.name] = [text.get_text() for text in figure.axes[0].texts]

    monkeypatch.setattr(plots, "_save", keep)
    rng = random.Random(0)
    layouts = [
        Layout(tp=2**tp, dp=2**dp, pp=pp) for tp in range(4) for dp in range(4) for pp in (1, 2, 3, 4)
    ][:50]
    rows = []
    for layout in layouts:
        figures = {"output_tokens_per_s": rng.uniform(10, 1000), "itl_ms": rng.uniform(1, 50)}
        predicted = {name: value * rng.uniform(0.8, 1.2) for name, value in figures.items()}
        rows.append(Row(str(layout), "8×(64→16)", dict(figures), dict(predicted)))
    write_report(tmp_path, "50 layouts", rows)
    assert len(rows) == 50 and {"frontier-1.png", "scaling.png"} < set(named)
    frontier = pareto_frontier(rows)
    assert sorted(named["frontier-1.png"]) == sorted(f"{each.layout}: 8" for each in frontier)
    assert len(named["predicted-itl_ms.png"]) == 4 and named["throughput-1.png"] == []


def test_an_open_loop_is_walked_through_step_by_step() -> None:
    model = CostModel(DENSE, Layout(), cluster(step_overhead_s=1.0))  # a step is a second, and what it holds
    found = predict_burst(model, SweepPoint(2, 10, 3), 64, 8, arrivals_s=[0.0, 1.5])
    # The first has its tokens at 1, 2 and 3 s; the second waits for the step from 1 to 2 s, then at 3, 4, 5 s.
    assert found.output_tokens_per_s == pytest.approx(6 / 5, rel=0.01)
    assert found.ttft_ms == pytest.approx((1000 + 1500) / 2, rel=0.01)
    assert found.ttft_p90_ms == pytest.approx(1000 + 0.9 * 500, rel=0.01)
    idle = predict_burst(model, SweepPoint(2, 10, 1), 64, 8, arrivals_s=[0.0, 60.0])
    assert idle.ttft_ms == pytest.approx(1000, rel=0.01) and idle.ttft_p90_ms == pytest.approx(1000, rel=0.01)


def test_prompts_of_an_open_loop_are_added_when_they_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(EngineConfig(device="cpu", num_blocks=64, executor="in_process"))
    added: list[float] = []
    add = engine.add_request

    def watched(*arguments: Any) -> Any:
        added.append(time.perf_counter() - began)
        return add(*arguments)

    monkeypatch.setattr(engine, "add_request", watched)
    try:
        began = time.perf_counter()
        figures = measure(engine, Workload(3, 4, 2, seed=1, rate=20.0))
    finally:
        engine.shutdown()
    due = arrival_times(3, 20.0, 1.0, seed=1)
    assert all(at >= arrival for at, arrival in zip(added, due, strict=True)) and len(added) == 3
    assert figures["output_tokens_per_s"] < 6 / due[-1] and figures["ttft_ms"]["p50"] > 0


def test_a_sweep_elsewhere_has_a_directory_of_its_own(tmp_path: Path) -> None:
    workload = SweepWorkload((SweepPoint(1, 4, 1),))
    SweepFolder(tmp_path, "bundled", workload, Place("10.0.0.1:6379"))
    SweepFolder(tmp_path, "bundled", workload, Place("auto"))  # an address of the same cluster
    for place in (Place(), Place("auto", http=True)):
        with pytest.raises(ConfigError, match="holds a sweep with another place; choose another"):
            SweepFolder(tmp_path, "bundled", workload, place)


def test_a_rate_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="rate must be positive, not 0"):
        SweepPoint(1, 4, 1, rate=0.0)
