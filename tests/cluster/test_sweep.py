"""`qwen3-dist sweep` as a user has it: real engines in child processes, tables, resuming, refusals."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.hardware import Link, as_dict
from cluster.planning.burst import predict_burst
from cluster.planning.cost_model import CostModel
from cluster.sweep import child
from cluster.sweep.report import order_agreement, summary
from cluster.sweep.rows import Row
from cluster.sweep.run import SweepFolder, SweepPoint, SweepWorkload, read_workload, run_sweep
from qwen3_dist.benchmark import Workload
from qwen3_dist.errors import ConfigError
from qwen3_dist.layout import Layout
from serve_app.cli import main
from tests.checkpoints import write_checkpoint
from tests.cluster.machines import DENSE, PLAIN, cluster

WORKLOAD = """\
points:
  - {num_prompts: 3, input_len: 12, output_len: 4}
  - {num_prompts: 1, input_len: 20, output_len: 1}
device: cpu
"""


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    (tmp_path / "workload.yaml").write_text(WORKLOAD)
    return tmp_path / "workload.yaml"


def sweep(out: Path, model: Path, workload: Path, *arguments: str) -> int:
    return main(["sweep", str(model), "--workload", str(workload), "--out", str(out), *arguments])


def test_every_layout_runs_and_is_set_beside_its_prediction(
    tmp_path: Path, workload: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_checkpoint(tmp_path / "model", moe=True)
    hardware = tmp_path / "hardware.yaml"
    hardware.write_text(yaml.safe_dump(as_dict(cluster(num_devices=2, devices_per_node=2, shared_host=True))))
    out = tmp_path / "out"
    asked = (out, model, workload, "--layouts", "tp=1;tp=2,ep=2", "--hardware", str(hardware))
    assert sweep(*asked) == 0
    shown = capsys.readouterr()
    assert "2/2 tp=2,ep=2: running" in shown.err and "output_tokens_per_s: median error" in shown.err
    assert shown.out.strip() == (out / "table.md").read_text().strip()
    with (out / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["layout"], row["point"]) for row in rows] == [
        (layout, point) for layout in ("tp=1", "tp=2,ep=2") for point in ("3×(12→4)", "1×(20→1)")
    ]
    for row in rows:
        measured, predicted = (float(row[f"output_tokens_per_s{end}"]) for end in ("", " predicted"))
        error = float(row["output_tokens_per_s error"].removesuffix("%")) / 100
        assert error == pytest.approx(predicted / measured - 1, rel=1e-3, abs=1e-3) and measured > 0
        assert (row["itl_ms"] == "") == (row["point"] == "1×(20→1)") and row["failure"] == ""
    kept = {file: file.stat().st_mtime_ns for file in (out / "layouts").iterdir()}
    assert sweep(*asked, "--json") == 0
    again = capsys.readouterr()
    assert again.err.count("done earlier") == 2 and "running" not in again.err
    assert [json.loads(line)["layout"] for line in again.out.splitlines()] == ["tp=1", "tp=2,ep=2"]
    assert kept == {file: file.stat().st_mtime_ns for file in (out / "layouts").iterdir()}
    pytest.importorskip("matplotlib")
    for chart in ("predicted-itl_ms", "throughput-2", "frontier-1", "scaling"):
        assert (out / f"{chart}.png").stat().st_size > 0


def test_a_layout_that_fails_is_kept_with_its_reason_and_passed_over(
    tmp_path: Path, workload: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_checkpoint(tmp_path / "model", moe=False)
    (model / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")  # no tensor is in it
    assert sweep(tmp_path / "out", model, workload, "--layouts", "tp=1;tp=2") == 0
    shown = capsys.readouterr()
    assert shown.err.count("failed: ") == 2
    known = json.loads((tmp_path / "out/layouts/tp1.json").read_text())
    assert known["layout"] == "tp=1" and "tensor" in known["error"]
    assert "tensor" in (tmp_path / "out/table.md").read_text()


def test_a_layout_that_hangs_is_ended(tmp_path: Path) -> None:
    short = SweepWorkload((SweepPoint(1, 4, 1),), device="cpu", timeout_s=0.01)
    folder = SweepFolder(tmp_path, "bundled", short)
    model = Path("/")
    ((layout, result),) = run_sweep(folder, [Layout()], model, True, short, lambda line: None)
    assert result == {"layout": "tp=1", "error": "took longer than timeout_s=0.01"}
    assert folder.result(layout) == result


def test_a_sweep_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    short = SweepWorkload((SweepPoint(1, 4, 1),), device="cpu", timeout_s=0.01)
    folder = SweepFolder(tmp_path, "bundled", short)
    folder.keep(Layout(), {"points": ["done"]})
    folder.keep(Layout(tp=2), {"error": "failed"})
    said: list[str] = []
    layouts = [Layout(), Layout(tp=2), Layout(tp=4)]
    found = dict(run_sweep(folder, layouts, Path("/"), True, short, said.append))
    assert found[Layout()]["points"] == ["done"] and found[Layout(tp=2)]["error"] == "failed"
    assert "timeout_s" in found[Layout(tp=4)]["error"]
    retried = dict(run_sweep(folder, layouts, Path("/"), True, short, said.append, retry_failed=True))
    assert retried[Layout()]["points"] == ["done"] and "timeout_s" in retried[Layout(tp=2)]["error"]


def test_another_sweeps_directory_is_refused(tmp_path: Path) -> None:
    one, other = (SweepWorkload((SweepPoint(n, 4, 1),)) for n in (1, 2))
    SweepFolder(tmp_path / "out", "bundled", one)
    SweepFolder(tmp_path / "out", "bundled", one)
    for model, workload, differing in (("Qwen3-8B", one, "model"), ("bundled", other, "workload")):
        with pytest.raises(ConfigError, match=f"holds a sweep with another {differing}; choose another"):
            SweepFolder(tmp_path / "out", model, workload)


@pytest.mark.parametrize(
    ("old", "new", "line", "reason"),
    [
        ("input_len: 12", "input_len: many", 2, "points.0.input_len must be a whole number, not 'many'"),
        ("num_prompts: 3", "num_prompts: 0", 2, "num_prompts must be positive, not 0"),
        (", output_len: 1}", "}", 3, "setting 'points.1.output_len' is required"),
        (
            "input_len: 20",
            "inputs: 20",
            3,
            "unknown setting 'points.1.inputs'; did you mean input_len?",
        ),
        ("device: cpu", "device: tpu", 4, "device must be one of auto, cpu, cuda, not 'tpu'"),
        ("device: cpu", "repeats: 0", 4, "repeats must be positive, not 0"),
        ("device: cpu", "timeout_s: soon", 4, "timeout_s must be a number, not 'soon'"),
        ("device: cpu", "points: []", 4, "points is given twice; keep one"),
    ],
)
def test_a_wrong_workload_is_refused_with_line_and_reason(
    workload: Path, old: str, new: str, line: int, reason: str
) -> None:
    assert old in WORKLOAD
    workload.write_text(WORKLOAD.replace(old, new))
    with pytest.raises(ConfigError) as refused:
        read_workload(workload)
    assert str(refused.value).startswith(f"{workload}:{line}: ") and reason in str(refused.value)


def test_a_workload_without_points_is_refused(workload: Path) -> None:
    for text in ("points: []\n", "points: 5\n", "device: cpu\n"):
        workload.write_text(text)
        with pytest.raises(ConfigError, match=r"workload.yaml:1: .*points"):
            read_workload(workload)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("bundled", "--layouts", "tp=x"), "has 'tp=x' where tp=N"),
        (("bundled", "--layouts", ";"), "--layouts is empty; write for example"),
        (("bundled", "--layouts", "tp=3"), "is not divisible by tp=3"),
        (("Qwen3-9B", "--layouts", "all"), "models that need no download are Qwen3-0.6B"),
        (("bundled", "--layouts", "all", "--hardware", "none.yaml"), "none.yaml cannot be read"),
        (("bundled", "--layouts", "all", "--workload", "none.yaml"), "none.yaml cannot be read"),
        (("bundled", "--layouts", "tp=1", "--out", "/dev/null/out"), "--out /dev/null/out cannot be used"),
        (("bundled",), "the following arguments are required: --layouts"),
    ],
)
def test_bad_input_is_refused(
    workload: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    sentence: str,
) -> None:
    common = ["--workload", str(workload), "--out", str(tmp_path / "out")]
    try:
        code: Any = main(["sweep", arguments[0], *common, *arguments[1:]])
    except SystemExit as error:
        code = error.code
    shown = capsys.readouterr()
    assert (code, shown.out) == (2, "") and sentence in shown.err and len(shown.err.splitlines()) == 1


def test_a_burst_is_walked_through_step_by_step() -> None:
    model = CostModel(DENSE, Layout(), cluster(step_overhead_s=1.0))  # a step is a second, and what it holds
    found = predict_burst(model, SweepPoint(3, 10, 5), max_num_batched_tokens=16, max_num_seqs=8)
    # 16 tokens: the first prompt and 6 of the second; a decode, 4 and 10: all have their first token at 2 s
    # but the first, at 1 s; then 3 decodes a step. The last ends at 6 s.
    assert found.ttft_ms == pytest.approx(2000, rel=0.01)
    assert found.itl_ms == pytest.approx(1000, rel=0.01)
    assert found.output_tokens_per_s == pytest.approx(15 / 6, rel=0.01)
    few = predict_burst(model, SweepPoint(4, 10, 2), max_num_batched_tokens=64, max_num_seqs=2)
    assert few.output_tokens_per_s == pytest.approx(8 / 4, rel=0.01)  # two after the other two
    one = predict_burst(model, SweepPoint(1, 10, 1), 64, 8)
    assert one.itl_ms is None


def test_pipeline_stages_work_on_a_burst_together() -> None:
    fast = cluster(inside=Link(0.0, 1e15), between=Link(0.0, 1e15))
    alone, deep = CostModel(DENSE, Layout(), fast), CostModel(DENSE, Layout(pp=2), fast)
    one, two = (predict_burst(deep, SweepPoint(n, 16, 20), 64, 8) for n in (1, 2))
    lone = predict_burst(alone, SweepPoint(1, 16, 20), 64, 8)
    assert one.itl_ms == pytest.approx(lone.itl_ms)  # one sequence passes both stages in turn
    # Two prompts go as one step; then each stage has one of the two sequences, hence half the time between
    # them, or rather what the slower stage, which holds the head, takes.
    slower = 2 * (309.4 + 200.0) * 1e-3  # µs of a layer and the head (see test_cost_model), in ms
    assert two.itl_ms == pytest.approx(slower, rel=0.05)


def test_dp_groups_share_a_burst() -> None:
    alone = CostModel(DENSE, Layout(), PLAIN)
    shared = CostModel(DENSE, Layout(dp=2), PLAIN)
    two, four = (SweepPoint(n, 16, 4) for n in (2, 4))
    assert predict_burst(shared, four, 64, 8).itl_ms == predict_burst(alone, two, 64, 8).itl_ms


def test_the_summary_counts_errors_and_order() -> None:
    def row(layout: str, point: str, measured: float, predicted: float) -> Row:
        return Row(layout, point, {"output_tokens_per_s": measured}, {"output_tokens_per_s": predicted})

    rows = [row("a", "p", 100, 110), row("b", "p", 50, 40), row("c", "p", 60, 39), row("a", "q", 10, 13)]
    assert order_agreement(rows, "output_tokens_per_s") == (2, 3)  # b and c are the wrong way round
    assert summary([*rows, Row("d", "", {}, {}, "failed")]) == [
        "output_tokens_per_s: median error 25.0%, largest 35.0%, of 4 rows",
        "predicted order right for 2 of 3 pairs of layouts at the same point",
    ]


def test_a_workload_is_written_as_it_is_read(workload: Path) -> None:
    points = asdict(read_workload(workload))["points"]
    assert points == (
        {"num_prompts": 3, "input_len": 12, "output_len": 4, "rate": None},
        {"num_prompts": 1, "input_len": 20, "output_len": 1, "rate": None},
    )


def test_a_point_is_warmed_up_once_before_its_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Workload] = []

    def measure(engine: Any, workload: Workload) -> dict[str, Any]:
        ran.append(workload)
        return dict.fromkeys((*child._KEPT, "hardware", "versions"))

    monkeypatch.setattr(child, "measure", measure)
    point = SweepPoint(3, 12, 9, rate=50.0)
    found = child.measured(
        SweepWorkload((point,), repeats=2), lambda point, seed: child._figures(None, point, seed)
    )
    assert len(found["points"][0]["repeats"]) == 2
    assert [(each.num_prompts, each.input_len, each.output_len) for each in ran] == [
        (3, 12, 4),
        (3, 12, 9),
        (3, 12, 9),
    ]
    assert len({each.seed for each in ran}) == 3  # other prompts
