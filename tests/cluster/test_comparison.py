"""Measured beside predicted: a machine that differs in one term is told from others by its runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.hardware import Cluster, parse_gpus
from cluster.planning.burst import predict_burst
from cluster.planning.burst_point import BurstPoint
from cluster.planning.comparison import TERMS, MeasuredRun, common_term, factors, predict_run
from cluster.planning.cost_model import StepShape
from cluster.planning.official import find_config
from cluster.planning.planner import PlanRequest, cost_model, predict
from qwen3_dist.layout import Layout
from tests.serve_app.command_line import printed, refusal

CONFIG = find_config("Qwen3-8B")[1]
BELIEVED = parse_gpus("4xH100")
LAYOUT = Layout.parse("tp=2")
REQUEST = PlanRequest(1, 1, 1)
RESULT: dict[str, Any] = {
    "model_id": "m", "num_prompts": 400, "completed": 400, "failed": 0, "request_rate": "inf", "max_concurrency": 32,
    "total_input_tokens": 400_000, "total_output_tokens": 80_000, "output_throughput": 5000.0,
    "mean_ttft_ms": 50.0, "median_ttft_ms": 45.0, "mean_tpot_ms": 6.0, "median_tpot_ms": 5.5,
}  # fmt: skip


def run_with(concurrency: int | None, rate: float | None = None, prompts: int = 10_000) -> MeasuredRun:
    return MeasuredRun("r", prompts, 1000, 200, rate, concurrency, 1.0, 1.0, 1.0)


def slower(term: str) -> Cluster:
    """A machine on which one term takes twice as long as believed."""
    device = BELIEVED.device
    if term == "reading weights":
        return replace(BELIEVED, device=replace(device, read_efficiency=device.read_efficiency / 2))
    if term == "reading the KV cache":
        return replace(BELIEVED, device=replace(device, kv_read_efficiency=device.kv_read_efficiency / 2))
    overheads = ("step_overhead_s", "sequence_overhead_s", "token_overhead_s", "layer_overhead_s")
    return replace(BELIEVED, **{name: 2 * getattr(BELIEVED, name) for name in overheads})


def result(tmp_path: Path, concurrency: int, on: Cluster) -> str:
    """A result file of a machine that does exactly as the model of `on`."""
    true = predict_run(
        CONFIG, LAYOUT, on, replace(REQUEST, max_num_batched_tokens=8192), run_with(concurrency)
    )
    found = RESULT | {
        "num_prompts": 10_000, "completed": 10_000, "max_concurrency": concurrency, "total_input_tokens": 10_000_000,
        "total_output_tokens": 2_000_000, "output_throughput": true.tokens_per_s,
        "mean_ttft_ms": true.ttft_ms, "mean_tpot_ms": true.itl_ms,
    }  # fmt: skip
    file = tmp_path / f"{concurrency}.json"
    file.write_text(json.dumps(found))
    return str(file)


def compare(capsys: pytest.CaptureFixture[str], *files: str, layout: str = "tp=2") -> dict[str, Any]:
    arguments = ("plan", "Qwen3-8B", "--gpus", "4xH100", "--compare", *files, "--layout", layout, "--json")
    found: dict[str, Any] = json.loads(printed(capsys, *arguments))
    return found


def test_a_run_is_predicted_as_plan_predicts_its_load() -> None:
    planned = predict(CONFIG, LAYOUT, BELIEVED, PlanRequest(1000, 200, 32))
    found = predict_run(CONFIG, LAYOUT, BELIEVED, REQUEST, run_with(32))
    assert (found.ttft_ms, found.itl_ms, found.tokens_per_s) == (
        planned.ttft_ms,
        planned.itl_ms,
        planned.tokens_per_s,
    )
    assert sum(found.ttft_terms.values()) == pytest.approx(found.ttft_ms)
    assert sum(found.itl_terms.values()) == pytest.approx(found.itl_ms, rel=1e-3)
    assert set(found.itl_terms) >= {"reading weights", "reading the KV cache", "collectives", "overheads"}


@pytest.mark.parametrize("layout", ["tp=2", "tp=2,dp=2,ep=4", "pp=2,dp=2,ep=2"])
def test_every_part_of_a_step_of_decodes_belongs_to_a_term(layout: str) -> None:
    for name in ("Qwen3-8B", "Qwen3-30B-A3B"):
        config = find_config(name)[1]
        if config.num_experts or "ep" not in layout:
            model = cost_model(config, Layout.parse(layout), BELIEVED, REQUEST)
            parts = model.step_parts(StepShape(64, 64_000, 0, 0, 64))
            assert set(parts) <= {part for names in TERMS.values() for part in names}


def test_a_rate_bounds_the_load_where_it_gives_less_than_the_concurrency() -> None:
    slow = predict_run(CONFIG, LAYOUT, BELIEVED, REQUEST, run_with(500, rate=2.0))
    assert slow.in_flight < 10 and slow.tokens_per_s == pytest.approx(2.0 * 200)
    bound = predict_run(CONFIG, LAYOUT, BELIEVED, REQUEST, run_with(4, rate=1000.0))
    assert bound.in_flight == 4


def test_prompts_that_come_at_once_are_predicted_as_a_burst() -> None:
    run = run_with(None, prompts=16)
    assert run.is_burst and run_with(16, prompts=16).is_burst and not run_with(8, prompts=16).is_burst
    found = predict_run(CONFIG, LAYOUT, BELIEVED, REQUEST, run)
    model = cost_model(CONFIG, LAYOUT, BELIEVED, REQUEST)
    burst = predict_burst(
        model, BurstPoint(8, 1000, 200), REQUEST.max_num_batched_tokens, 8
    )  # on each of 2 replicas
    assert (found.ttft_ms, found.itl_ms) == (burst.ttft_ms, burst.itl_ms)
    assert found.tokens_per_s == pytest.approx(2 * burst.output_tokens_per_s)


def test_factors_say_how_far_a_term_must_change() -> None:
    terms = {"a": 6.0, "b": 3.0, "c": 1.0}
    assert factors(terms, 10.0, 13.0) == {"a": 1.5, "b": 2.0, "c": 4.0}
    assert factors(terms, 10.0, 8.0) == {"a": pytest.approx(2 / 3), "b": pytest.approx(1 / 3), "c": None}


def test_the_term_that_explains_all_runs_is_found() -> None:
    loads = [{"fixed": 2.0, "growing": float(n)} for n in (1, 10, 100)]
    fixed = [(terms, sum(terms.values()), 3 * terms["fixed"] + terms["growing"]) for terms in loads]
    growing = [(terms, sum(terms.values()), terms["fixed"] + 0.5 * terms["growing"]) for terms in loads]
    assert common_term(fixed) == ("fixed", pytest.approx(3), pytest.approx(0, abs=1e-9))
    assert common_term(growing) == ("growing", pytest.approx(0.5), pytest.approx(0, abs=1e-9))
    assert common_term([]) is None


@pytest.mark.parametrize("term", ["reading weights", "reading the KV cache", "overheads"])
def test_the_term_that_is_off_is_named(term: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [result(tmp_path, concurrency, slower(term)) for concurrency in (4, 100, 400)]
    found = compare(capsys, *files)
    assert found["verdict"][0].startswith(f"TPOT is off. {term[0].upper()}{term[1:]} taking ")
    factor = float(found["verdict"][0].partition(" taking ")[2].split()[0])
    assert 1.7 < factor < 2.6
    # One run has candidates alone, the true one among them, and asks for more.
    found = compare(capsys, files[1])
    assert found["runs"][0]["itl_terms_ms"][term]["factor"] == pytest.approx(2, rel=0.3)
    assert "One run does not tell them apart" in found["verdict"][0]


def test_runs_that_no_term_explains_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [Path(result(tmp_path, concurrency, BELIEVED)) for concurrency in (4, 100, 400)]
    for file, factor in zip(files, (3.0, 0.3, 3.0), strict=True):
        values = json.loads(file.read_text())
        file.write_text(json.dumps(values | {"mean_tpot_ms": factor * values["mean_tpot_ms"]}))
    assert "no term alone explains all runs" in compare(capsys, *map(str, files))["verdict"][0]


def test_medians_of_a_burst_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.json"
    file.write_text(json.dumps(RESULT | {"max_concurrency": None}))
    (run,) = compare(capsys, str(file))["runs"]
    assert run["measured"] == {"ttft_ms": 45.0, "itl_ms": 5.5, "tokens_per_s": 5000.0}
    assert run["load"] == "400 at once, 1000 in, 200 out"


def test_agreement_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = compare(capsys, result(tmp_path, 32, BELIEVED))
    assert found["verdict"] == ["TPOT agrees within 10%.", "TTFT agrees within 10%."]
    assert found["runs"][0]["ratio"] == {"ttft_ms": 1.0, "itl_ms": 1.0, "tokens_per_s": 1.0}
    assert (found["layout"], found["replicas"]) == ("tp=2", 2)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mean_ttft_ms": 9000.0}, "while TPOT agrees: waiting would have to take"),
        ({"output_throughput": 10.0}, "tokens/s is off though both latencies agree"),
        ({"mean_tpot_ms": 0.01}, "no term alone explains it"),
    ],
)
def test_other_figures_that_are_off_are_told(
    changes: dict[str, Any], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(result(tmp_path, 128, BELIEVED))
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert sentence in " ".join(compare(capsys, str(file))["verdict"])


def test_the_table_shows_both_and_the_best_layout_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.json"
    file.write_text(json.dumps(RESULT))
    text = printed(capsys, "plan", "Qwen3-8B", "--gpus", "4xH100", "--compare", str(file))
    best = printed(capsys, "plan", "Qwen3-8B", "--gpus", "4xH100", "--input-len", "1000", "--output-len", "200",
                   "--concurrency", "32", "--json").splitlines()[0]  # fmt: skip
    assert text.startswith(f"{json.loads(best)['layout']} in ") and "32 in flight, 1000 in, 200 out" in text
    rows = [line.split()[-3:] for line in text.split("\n\n")[1].splitlines()[1:]]
    measured, predicted, ratio = ([float(cell.replace(",", "")) for cell in row] for row in rows)
    assert measured == [50, 6, 5000]
    assert ratio == [pytest.approx(a / b, abs=0.01) for a, b in zip(measured, predicted, strict=True)]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "r.json cannot be read (No such file or directory)"),
        (
            "not json",
            "r.json is no result of bench serve; write one with qwen3-dist bench serve --save-result",
        ),
        ("[1]", "r.json is no result of bench serve"),
        ('{"layout": "tp=1"}', "r.json is no result of bench serve"),
        (json.dumps(RESULT | {"completed": 0}), "r.json: no request of this run was answered"),
        (
            json.dumps(RESULT | {"mean_tpot_ms": "fast"}),
            "r.json has 'fast' as mean_tpot_ms, which must be a number",
        ),
        (json.dumps({k: v for k, v in RESULT.items() if k != "mean_ttft_ms"}), "r.json has no mean_ttft_ms"),
    ],
)
def test_a_wrong_file_is_refused(
    content: str | None, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.json"
    if content is not None:
        file.write_text(content)
    assert sentence in refusal(capsys, "plan", "Qwen3-8B", "--gpus", "4xH100", "--compare", str(file))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--gpus", "4xH100", "--input-len", "5"), "leave --input-len out"),
        (("--gpus", "4xH100", "--all"), "leave --all out"),
        (("--gpus", "H100"), "--compare needs the GPUs that were measured, as in --gpus 8xH100, not H100"),
        (("--gpus", "4xH100", "--layout", "tp=3"), "tp=3"),
        (("--gpus", "4xH100", "--layout", "tp=8"), "needs 8"),
    ],
)
def test_what_a_comparison_cannot_use_is_refused(
    arguments: tuple[str, ...], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.json"
    file.write_text(json.dumps(RESULT))
    assert sentence in refusal(capsys, "plan", "Qwen3-8B", *arguments, "--compare", str(file))
