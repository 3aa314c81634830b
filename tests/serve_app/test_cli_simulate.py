"""`qwen3-dist simulate` as a user has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.serve_app.command_line import printed, refusal

SMALL = ("simulate", "Qwen3-8B", "--gpus", "8xH100", "--layout", "tp=2")
LOAD = ("--rate", "4", "--duration", "20", "--input-len", "300:0.5", "--output-len", "40")


def simulated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(printed(capsys, *arguments, "--json"))
    return report


def test_a_simulation_reports_latencies_replicas_and_gpu_hours(capsys: pytest.CaptureFixture[str]) -> None:
    report = simulated(capsys, *SMALL, *LOAD, "--ttft-ms", "5000", "--itl-ms", "1000")
    assert report["cluster"] == "8 x H100"
    assert report["requests"] > 40
    assert 0 < report["ttft_ms"]["p50"] <= report["ttft_ms"]["p90"] <= report["ttft_ms"]["p99"]
    assert report["slo"]["attained"] == 1.0
    assert report["replicas"]["over_time"] == [[0.0, 4, 0, 0]]
    assert report["replicas"]["gpu_hours"] == pytest.approx(8 * report["span_s"] / 3600, abs=1e-3)


def test_the_same_seed_gives_the_same_report(capsys: pytest.CaptureFixture[str]) -> None:
    first, again, other = (
        {**simulated(capsys, *SMALL, *LOAD, "--seed", seed), "simulation": None} for seed in "334"
    )
    assert first == again
    assert first != other


def test_a_faster_cluster_has_shorter_times(capsys: pytest.CaptureFixture[str]) -> None:
    slow, fast = (
        simulated(capsys, "simulate", "Qwen3-8B", "--gpus", f"2x{kind}", "--layout", "tp=2", *LOAD)
        for kind in ("A100", "B200")
    )
    assert slow["ttft_ms"]["p50"] > fast["ttft_ms"]["p50"]
    assert slow["itl_ms"]["p50"] > fast["itl_ms"]["p50"]


def test_replicas_follow_the_load(capsys: pytest.CaptureFixture[str]) -> None:
    report = simulated(
        capsys, *SMALL, "--rate", "2,150,2", "--duration", "180", "--input-len", "100", "--output-len", "60",
        "--min-replicas", "1", "--start-up-s", "10", "--downscale-delay-s", "20",
        "--target-ongoing-requests", "8",
    )  # fmt: skip
    running = [row[1] for row in report["replicas"]["over_time"]]
    assert running[0] == 1
    assert max(running) > 1
    assert running[-1] == 1
    assert 1 < report["replicas"]["mean"] < 4


def test_prompts_that_begin_alike_hit_the_prefix_cache(capsys: pytest.CaptureFixture[str]) -> None:
    prefixes = ("--prefix-len", "160", "--prefixes", "2")
    with_cache = simulated(capsys, *SMALL, *LOAD, *prefixes)
    without = simulated(capsys, *SMALL, *LOAD, *prefixes, "--no-prefix-caching")
    assert with_cache["prefix_hits"]["share"] > 0.3
    assert without["prefix_hits"]["tokens"] == 0


def test_a_trace_is_simulated(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,input_len,output_len\n0,100,5\n2,100,5\n60,50,1\n")
    report = simulated(capsys, *SMALL, "--trace", str(trace))
    assert report["requests"] == 3
    assert 60 < report["span_s"] < 61


def test_a_cluster_file_is_simulated(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("preset: H100\nnum_devices: 16\n")
    report = simulated(capsys, "simulate", "Qwen3-0.6B", "--cluster", str(file), "--layout", "tp=1", *LOAD)
    assert report["replicas"]["most"] == 16 and report["layout_is"] == "given"


def test_without_a_layout_the_best_of_plan_is_taken_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    short = (*SMALL[:4], "--duration", "2", "--rate", "4,9", *LOAD[4:])
    found = simulated(capsys, *short)
    planned = ("plan", *SMALL[1:4], "--input-len", "300", "--output-len", "40", "--rate", "9", "--json")
    best = json.loads(printed(capsys, *planned).splitlines()[0])
    assert found["layout"] == best["layout"]
    assert "best by `plan` for 9 requests/s of 300 + 40 tokens; give --layout" in found["layout_is"]
    assert "best by `plan`" in printed(capsys, *short)
    closed = simulated(capsys, *SMALL[:4], "--concurrency", "8", *LOAD[4:])
    assert "for 8 clients of 300 + 40 tokens" in closed["layout_is"]


def test_a_wrong_trace_is_refused_with_its_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"arrival_s": 0, "input_len": 1, "output_len": 1}\n{"arrival_s": 0, "input_len": 1}\n')
    line = refusal(capsys, *SMALL, "--trace", str(trace))
    assert line == f"qwen3-dist: {trace}:2: output_len is missing"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--rate", "4"), "--duration is missing; give --trace, or --rate, --duration, --input-len and"),
        (("--trace", "x.csv", "--rate", "4"), "leave --rate out"),
        (("--trace", "x.csv"), "x.csv: the trace cannot be read"),
        (("--rate", "4,x"), "'4,x' is not a rate or a list of rates"),
        ((*LOAD, "--layout", "tp=16"), "tp=16 does not fit into nodes of 8"),
        ((*LOAD, "--layout", "tp=8,dp=2"), "layout tp=8,dp=2 needs 16 devices and the cluster has 8"),
        ((*LOAD, "--layout", "tp=3"), "n_heads=32 is not divisible by tp=3"),
        ((*LOAD, "--max-replicas", "9"), "max_replicas=4 is the most"),
        ((*LOAD, "--min-replicas", "0"), "min_replicas=0 must lie between 1 and max_replicas=4"),
        ((*LOAD, "--num-blocks", "10000000"), "leave room for"),
        ((*LOAD, "--max-model-len", "100"), "300 + 40 tokens exceed the 100"),
        ((*LOAD, "--ttft-ms", "0"), "ttft_ms must be positive"),
        ((*LOAD, "--start-up-s", "-1"), "start_up_s must not be negative"),
        ((*LOAD, "--num-requests", "9"), "--num-requests is of a closed loop; leave it out"),
        ((*LOAD, "--prefixes", "3"), "both a length and a number"),
        ((*LOAD, "--input-len", "many"), "'many' must be N or MEAN:CV"),
        ((*LOAD, "--gpus", "8xH999"), "there is no preset 'H999'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], reason: str
) -> None:
    assert reason in refusal(capsys, *SMALL, *arguments)


def test_a_model_that_does_not_fit_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "simulate", "Qwen3-235B-A22B", "--gpus", "4xH100", *LOAD)
    assert "the weights of layout" in line and "leave room for 0 tokens" in line
