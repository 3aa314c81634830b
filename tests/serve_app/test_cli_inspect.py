"""`inspect` and `plan` with the settings that change a model's config, and the check of its weights by headers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve_app.cli import main
from tests.checkpoints import write_checkpoint

YARN = '{"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}'
LOAD = ("--gpus", "8xH100", "--concurrency", "8", "--output-len", "64")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", moe=True)


def inspected(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    code = main(["inspect", "--json", *arguments])
    shown = capsys.readouterr()
    return code, json.loads(shown.out), shown.err


def change(path: Path, **changes: torch.Tensor | None) -> None:
    file = path / "model.safetensors"
    tensors = {**load_file(file), **{name.replace("__", "."): each for name, each in changes.items()}}
    save_file({name: each for name, each in tensors.items() if each is not None}, file, {"format": "pt"})


def test_overrides_of_the_config_change_the_report_and_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    _, report, _ = inspected(capsys, "Qwen3-8B", "--hf-overrides", YARN)
    assert report["sizes"]["context_length"] == 131072 and report["weights"] == "not here"
    long = ("plan", "Qwen3-8B", "--input-len", "100000", *LOAD)
    assert main(list(long)) == 2 and "exceed the model's context of 40960" in capsys.readouterr().err
    assert main([*long, "--hf-overrides", YARN, "--quantize", "fp8"]) == 0
    assert f"--hf-overrides '{YARN}' --quantize fp8" in capsys.readouterr().out
    assert main(["inspect", "Qwen3-8B", "--hf-overrides", '{"no_such_field": 1}']) == 2
    assert "hf_overrides names 'no_such_field'" in capsys.readouterr().err


def test_a_cache_in_fp8_takes_half_the_bytes_and_holds_twice_the_sequences(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fp8 = ("--kv-cache-dtype", "fp8")
    _, plain, _ = inspected(capsys, "Qwen3-8B", "--layout", "tp=2")
    _, coded, _ = inspected(capsys, "Qwen3-8B", "--layout", "tp=2", *fp8)
    assert (plain["kv_cache_dtype"], coded["kv_cache_dtype"]) == ("bfloat16", "fp8")
    assert 2 * coded["kv_bytes_per_token"] == plain["kv_bytes_per_token"] == 2 * 36 * 8 * 128 * 2
    planned = ["plan", "Qwen3-8B", "--input-len", "4000", *LOAD]
    batches, tokens = [], []
    for more in ((), fp8):
        assert main([*planned, *more, "--json"]) == 0
        rows = map(json.loads, capsys.readouterr().out.splitlines())
        batches.append(next(row["max_batch"] for row in rows if row["layout"] == "tp=1"))
        simulated = ["simulate", "Qwen3-8B", "--gpus", "1xH100", "--rate", "1", "--duration", "2"]
        assert main([*simulated, "--input-len", "64", "--output-len", "8", "--json", *more]) == 0
        tokens.append(json.loads(capsys.readouterr().out)["num_blocks"])
    assert batches[1] // 2 == batches[0] and tokens[1] // 2 == tokens[0]
    assert main([*planned, *fp8]) == 0 and "--kv-cache-dtype fp8" in capsys.readouterr().out


def test_rounded_weights_take_the_bytes_of_an_fp8_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    _, rounded, _ = inspected(capsys, "Qwen3-8B", "--quantize", "fp8", "--layout", "tp=2")
    _, stored, _ = inspected(capsys, "Qwen3-8B-FP8", "--layout", "tp=2")
    assert rounded["bytes_per_rank"] == stored["bytes_per_rank"]
    assert rounded["quantization"] == "fp8 (e4m3) by blocks of 128 x 128, rounded while loading"
    assert main(["inspect", "Qwen3-8B-FP8", "--quantize", "fp8"]) == 2
    assert "are quantised already (fp8); leave quantize out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "quantize", "bits", "described"),
    [
        ("Qwen3-30B-A3B", "none", 16, "none"),
        ("Qwen3-30B-A3B", "int8", 8 + 32 / 2048, "int8 by outputs, rounded while loading"),
        ("Qwen3-30B-A3B", "fp8", 8 + 32 / 128**2, "fp8 (e4m3) by blocks of 128 x 128, rounded while loading"),
        ("Qwen3-30B-A3B", "int4", 4 + 32 / 128, "int4 by groups of 128 inputs, rounded while loading"),
        ("Qwen3-30B-A3B-AWQ", "none", 4 + 40 / 128, "awq: int4 by groups of 128 inputs with zero points"),
        pytest.param(
            *("qwen/qwen3-30b-a3b-gptq-int4", "none", 4 + 32 / 128, "gptq: int4 by groups of 128 inputs"),
            marks=pytest.mark.slow,
        ),
        ("Qwen3-30B-A3B-NVFP4", "none", 4 + 32 / 16, "compressed-tensors: fp4 (e2m1) by groups of 16 inputs"),
        pytest.param(
            *(
                "Qwen3-30B-A3B-MXFP4",
                "none",
                4 + 32 / 32,
                "compressed-tensors: fp4 (e2m1) by groups of 32 inputs",
            ),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_inspect_and_plan_know_the_bytes_of_each_format(
    capsys: pytest.CaptureFixture[str], model: str, quantize: str, bits: float, described: str
) -> None:
    _, report, _ = inspected(capsys, model, "--quantize", quantize)
    plain = 2 * 151936 * 2048 * 2 + 48 * 128 * 2048 * 2  # embedding, head and routers
    linear = 48 * (2048 * 128 * (2 * 32 + 2 * 4) + 128 * 3 * 2048 * 768)
    expected = plain + linear * bits / 8
    assert report["bytes_per_rank"][0] == pytest.approx(expected, rel=2e-3)
    assert report["quantization"] == described
    layout = ("--input-len", "100", *LOAD, "--gpus", "1xH100", "--quantize", quantize, "--json")
    assert main(["plan", model, *layout]) == 0
    plans = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    [alone] = [plan for plan in plans if plan["layout"] == "tp=1"]
    assert alone["bytes_per_rank"]["weights"] == pytest.approx(expected, rel=2e-3)


def test_whole_weights_are_counted(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    code, report, said = inspected(capsys, str(path), "--quantize", "fp8")
    assert (code, report["weights"]) == (0, "complete, 135 tensors") and "qwen3-dist" not in said


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model__layers__1__mlp__experts__3__up_proj__weight": None}, "lacks 1 tensor (model.layers.1.mlp."),
        ({"model__norm__weight": torch.ones(63)}, "has shape [63] where config.json makes it [64]"),
        ({"model__layers__4__odd": torch.ones(1)}, "holds 1 tensor (model.layers.4.odd)"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    capsys: pytest.CaptureFixture[str], path: Path, changes: dict[str, Any], sentence: str
) -> None:
    change(path, **changes)
    code, report, said = inspected(capsys, str(path))
    assert code == 2 and report["weights"] == "not usable" and sentence in said
