"""`verify` finds no difference to transformers where there is none, and the layer of a planted fault."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen3_dist import verify as module
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.weights import packed
from serve_app.cli import main
from tests.checkpoints import write_checkpoint
from tests.quantized import write_channels, write_fp8
from tests.quantized_packed import write_awq, write_fp4, write_gptq, write_pack_quantized

DENSE: dict[str, Any] = {"moe": False}
MOE: dict[str, Any] = {"moe": True, "mlp_only_layers": [1]}
KINDS: dict[str, Callable[[Path], Path]] = {
    "dense": lambda path: write_checkpoint(path, **DENSE),
    "moe": lambda path: write_checkpoint(path, **MOE),
    "fp8 dense": lambda path: write_fp8(path, 24, 20, **DENSE).quantized,
    "fp8 moe": lambda path: write_fp8(path, 24, 20, **MOE).quantized,
    "fp8 fused": lambda path: write_fp8(path, 24, 20, stacks=True, **MOE).quantized,
    "fp8 by tensors": lambda path: write_channels(path, whole=True, **DENSE).quantized,
    "int8": lambda path: write_channels(path, int8=True, **MOE).quantized,
    "int4": lambda path: write_pack_quantized(path, size=20, zeros=True, order=True, **MOE).quantized,
    "int4 fused": lambda path: write_pack_quantized(path, zeros=True, stacks=True, **MOE).quantized,
    "8 bits": lambda path: write_pack_quantized(path, 8, zeros=True, **DENSE).quantized,
    "awq": lambda path: write_awq(path, **MOE).quantized,
    "gptq": lambda path: write_gptq(path, sym=False, order=True, **MOE).quantized,
    "gptq 8 bits": lambda path: write_gptq(path, 8, sym=False, v2=True, **DENSE).quantized,
    "nvfp4": lambda path: write_fp4(path, **MOE).quantized,
    "nvfp4 fused": lambda path: write_fp4(path, stacks=True, **MOE).quantized,
    "modelopt fused": lambda path: write_fp4(path, "modelopt", stacks=True, **MOE).quantized,
    "mxfp4": lambda path: write_fp4(path, "mxfp4", **DENSE).quantized,
}


# Others of their kind are in every run.
SLOW = ("int4 fused", "8 bits", "gptq 8 bits", "nvfp4", "modelopt fused", "mxfp4")


def verified(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["verify", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind in SLOW else ()) for kind in KINDS]
)
def test_the_same_weights_are_not_apart(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str
) -> None:
    code, report = verified(capsys, str(KINDS[kind](tmp_path / "model")), "--layers")
    assert code == 0 and report["first_apart"] == ""
    assert report["largest_kl"] < 1e-6 and report["largest_logit_error"] < 1e-3
    assert len(report["layers"]) == 4 and max(report["layers"]) < 1e-4
    assert report["same_argmax"] == 1 and report["tokens"] == 58


def test_a_checkpoint_in_parts_is_compared(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", moe=False, num_hidden_layers=1)
    assert main(["shard", str(path), "--layout", "tp=2", "--out", str(tmp_path / "parts")]) == 0
    code, report = verified(capsys, str(tmp_path / "parts"))
    assert code == 0 and report["first_apart"] == ""


def test_a_fault_in_one_layer_is_found_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, load = write_checkpoint(tmp_path / "model", **MOE), module.load_shard

    def with_fault(*arguments: Any) -> Qwen3Model:
        model = load(*arguments)
        model.blocks[2].norm2.scale.data.mul_(1.05)
        return model

    monkeypatch.setattr(module, "load_shard", with_fault)
    code, report = verified(capsys, str(path), "--layers")
    assert code == 1 and report["first_apart"] == "block 2"
    assert max(report["layers"][:2]) < 1e-4 and report["layers"][2] > 1e-3
    code, report = verified(capsys, str(path))
    assert code == 1 and report["first_apart"] == "prompt 0, position 0" and report["layers"] == []


def test_a_tokenizers_texts_are_the_prompts_of_the_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--layers"]) == 0
    shown = capsys.readouterr().out
    assert "first_apart" in shown and "none" in shown and "same_argmax" in shown


def test_what_it_needs_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_checkpoint(tmp_path / "model", **DENSE)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["verify", str(path)]) == 2
    assert "verify needs transformers; pip install 'transformers>=5.17'" in capsys.readouterr().err


def test_an_awq_order_of_words_that_is_wrong_is_found_in_the_first_block(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = packed._split
    monkeypatch.setattr(packed, "_split", lambda words, packing: split(words, packing._replace(order=None)))
    code, report = verified(capsys, str(write_awq(tmp_path / "model", **DENSE).quantized), "--layers")
    assert code == 1 and report["first_apart"] == "block 0"
