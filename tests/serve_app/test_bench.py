"""`qwen3-dist bench` as a user has it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import write_checkpoint
from tests.serve_app.command_line import printed, refusal

SMALL = ("--num-prompts", "5", "--input-len", "24", "--output-len", "6", "--json")


Measured = Callable[..., dict[str, Any]]


@pytest.fixture
def measured(capsys: pytest.CaptureFixture[str]) -> Measured:
    def figures(*arguments: str) -> dict[str, Any]:
        (line,) = printed(capsys, "bench", *arguments, *SMALL).splitlines()
        return json.loads(line)

    return figures


def test_throughput_runs_all_prompts_at_once(measured: Measured) -> None:
    figures = measured("throughput", "--dtype", "float32")
    assert {"hardware", "versions", "peak_memory_mib", "start_s", "prefix_hits"} <= figures.keys()
    assert (figures["kind"], figures["model"], figures["layout"]) == ("throughput", "bundled", "tp=1")
    assert figures["backends"].startswith(("CPU", "NVIDIA"))
    assert figures["output_tokens_per_s"] * 5 == pytest.approx(figures["total_tokens_per_s"], rel=1e-2)
    for name in ("ttft_ms", "itl_ms"):
        assert 0 < figures[name]["p50"] <= figures[name]["p90"] <= figures[name]["p99"]
    assert (figures["steps"], figures["mean_batch"], figures["prefix_hits"]) == (6, 5.0, 0)


def test_how_many_guesses_were_right_is_said(measured: Measured, capsys: pytest.CaptureFixture[str]) -> None:
    off = measured("throughput")
    on = measured("throughput", "--speculative", "ngram,k=3,min=1")
    assert (off["drafted_tokens"], off["accepted_tokens"], off["acceptance_rate"]) == (0, 0, None)
    assert on["acceptance_rate"] == pytest.approx(on["accepted_tokens"] / on["drafted_tokens"], abs=1e-3)
    assert "'eagle'" in refusal(capsys, "bench", "throughput", "--speculative", "eagle")


def test_latency_runs_one_batch_after_the_other_on_random_weights(measured: Measured, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, moe=True)
    (path / "model.safetensors").unlink()
    arguments = ("--batch-size", "2", "--layout", "tp=2,ep=2", "--random-weights", str(path / "config.json"))
    figures = measured("latency", *arguments)
    assert figures["model"] == f"{path / 'config.json'} (random weights)"
    assert figures["layout"] == "tp=2,ep=2"
    assert pytest.approx(figures["mean_batch"], rel=0.2) == 5 / 3


def test_what_cannot_be_measured_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    both = refusal(capsys, "bench", "throughput", str(tmp_path), "--random-weights", "config.json")
    assert "give either MODEL or --random-weights, not both" in both
    assert "needs a config.json" in refusal(capsys, "bench", "latency", "--random-weights", str(tmp_path))
    assert "lower --input-len or --output-len" in refusal(
        capsys, "bench", "throughput", "--input-len", "9000"
    )
    assert "'0' is not a positive number" in refusal(capsys, "bench", "throughput", "--num-prompts", "0")
