"""`python -m benchmarks.published`: what it reads, counts and fits."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.published.fit import cluster_with, fit
from benchmarks.published.points import Point, read_points
from benchmarks.published.predictions import errors, layout_of, ordered_pairs, predicted
from cluster.hardware import FITTED, PRESETS
from cluster.planning.clients import Latencies
from cluster.planning.expected_errors import expected_error
from cluster.planning.official import find_config, planned
from qwen3_dist.errors import ConfigError
from qwen3_dist.layout import Layout

HEADER = "model,system,engine,engine_version,weights,isl,osl,batch,tp,dp,moe_tp,moe_ep,ttft_ms,tpot_ms\n"
LINE = "Qwen/Qwen3-235B-A22B-FP8,h200_sxm,sglang,0.5.6,fp8_block,1000,500,9,4,1,4,1,354,15.4\n"
POINT = Point("Qwen3-32B", "H100", "vllm", "0.12", "bf16", 1024, 64, 8, (2, 1, 1, 1), 150.0, 16.0)


def written(directory: Path, text: str) -> Path:
    path = directory / "points.csv"
    path.write_text(text)
    return path


def test_a_line_is_a_point(tmp_path: Path) -> None:
    (point,) = read_points(written(tmp_path, HEADER + LINE))
    layout = (4, 1, 4, 1)
    assert point == Point(
        "Qwen3-235B-A22B-FP8", "H200", "sglang", "0.5.6", "fp8_block", 1000, 500, 9, layout, 354.0, 15.4
    )
    assert layout_of(find_config(point.model)[1], point) == Layout(tp=4)
    attention_by_groups = replace(point, layout=(1, 1, 2, 2))
    assert layout_of(find_config(point.model)[1], attention_by_groups) == Layout(dp=4, ep=2)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("h200_sxm", "t4", ":2: system 't4' is not known; known are a100_sxm, h100_sxm"),
        ("fp8_block", "gguf", ":2: weights 'gguf' is not known; known are bf16, fp8"),
        (",354,", ",fast,", ":2: ttft_ms must be a positive number, not 'fast'"),
        (",354,", ",-1,", ":2: ttft_ms must be a positive number, not '-1'"),
        (",9,4,", ",0,4,", ":2: batch must be a whole number from 1 on, not '0'"),
        (",9,4,1,", ",9,4,1.0,", ":2: dp must be a whole number from 0 on, not '1.0'"),
        ("Qwen3-235B-A22B-FP8", "Llama-3", ":2: model 'Llama-3' is not known; known are Qwen3-0.6B"),
        ("tpot_ms", "tpot", ":2: tpot_ms is missing"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, old: str, new: str, sentence: str) -> None:
    path = written(tmp_path, (HEADER + LINE).replace(old, new))
    with pytest.raises(ConfigError) as refused:
        read_points(path)
    assert str(refused.value).startswith(str(path) + sentence)


def test_the_command_prints_one_object(tmp_path: Path) -> None:
    path = written(tmp_path, HEADER + LINE)
    command = [sys.executable, "-m", "benchmarks.published", "--json", "--points"]
    printed = subprocess.run([*command, path, path], capture_output=True, text=True, check=True).stdout
    found = json.loads(printed)
    assert list(found) == [
        "points", "ttft_mape", "tpot_mape", "ttft_bias", "tpot_bias", "pairs_right", "pairs"
    ]  # fmt: skip
    assert found["points"] == 2 and found["pairs"] == 0
    refused = subprocess.run([*command, tmp_path / "none.csv"], capture_output=True, text=True)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1


def latencies(ttft_s: float, itl_s: float) -> Latencies:
    return Latencies(ttft_s, ttft_s, ttft_s, ttft_s, itl_s, 1.0)


def test_errors_are_relative_to_what_was_measured() -> None:
    found = errors([POINT, POINT], [latencies(0.300, 0.008), latencies(0.150, 0.016)])
    assert found == {
        "points": 2, "ttft_mape": 0.5, "tpot_mape": 0.25, "ttft_bias": 0.5, "tpot_bias": -0.25,
        "pairs_right": 0, "pairs": 0,
    }  # fmt: skip


def test_pairs_are_layouts_of_one_workload_that_differ() -> None:
    faster = replace(POINT, layout=(4, 1, 1, 1), tpot_ms=10.0)
    near = replace(POINT, layout=(8, 1, 1, 1), tpot_ms=15.5)
    other = replace(POINT, layout=(8, 1, 1, 1), tpot_ms=1.0, batch=9)
    again = replace(POINT, tpot_ms=20.0)
    points = [POINT, faster, near, other, again]
    assert ordered_pairs(points, [16.0, 10.0, 15.0, 1.0, 20.0]) == (4, 4)
    assert ordered_pairs(points, [16.0, 17.0, 15.0, 1.0, 20.0]) == (2, 4)


def test_a_fit_finds_constants_again() -> None:
    """Points that other constants predict; the fit starts from the presets' own."""
    planted: dict[str, Any] = json.loads(json.dumps(FITTED))
    planted["device"]["read_efficiency"] *= 0.8
    planted["device"]["flops_efficiency"] *= 0.7
    points = []
    for batch, input_len in ((1, 100), (1, 4000), (8, 100), (8, 4000)):
        for tp in (1, 2):
            asked = replace(POINT, batch=batch, input_len=input_len, layout=(tp, 1, 1, 1))
            seen = predicted(asked, cluster_with(planted, "H100"), planted["expert_imbalance"])
            points.append(replace(asked, ttft_ms=1e3 * seen.ttft_s, tpot_ms=1e3 * seen.itl_s))
    said: list[str] = []
    found = fit(points, FITTED, said.append, most=6)
    for name in ("read_efficiency", "flops_efficiency"):
        began, wanted = (constants["device"][name] for constants in (FITTED, planted))
        assert abs(found.constants["device"][name] - wanted) < 0.4 * abs(began - wanted)
    assert found.errors.shape == (8, 2) and said[-1].startswith("left out in turn: TTFT off by")


def test_predictions_carry_the_error_of_their_device_and_weights() -> None:
    config = find_config("Qwen3-32B")[1]
    known = FITTED["errors"]["H100 bf16 dense"]
    found = expected_error(config, PRESETS["H100"], 8)
    assert found is not None and found.as_json() == {
        "points": known["points"], "ttft": known["ttft"], "itl": known["itl"]
    }  # fmt: skip
    unknown = expected_error(planned(config, "int4"), PRESETS["A100"], 1)
    assert str(unknown) == "The error is not known: a dense model in int4 on A100 was not measured."
    nodes = expected_error(config, PRESETS["H100"], 16)
    assert nodes is not None and nodes.itl is None
    measured = replace(PRESETS["H100"], device=replace(PRESETS["H100"].device, name="this machine"))
    assert expected_error(config, measured, 1) is None


def test_who_comes_to_an_engine_with_one_step_in_flight_waits_less() -> None:
    one, two = (predicted(replace(POINT, engine=engine)) for engine in ("vllm", "another"))
    assert 0.5 * one.itl_s < two.ttft_s - one.ttft_s < 0.5 * one.ttft_s
    assert one.itl_s == pytest.approx(two.itl_s, rel=0.1)
