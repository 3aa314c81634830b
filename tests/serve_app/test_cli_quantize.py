"""`quantize` writes checkpoints that give what the same weights give when they are rounded while loading."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.errors import ResourceError
from qwen3_dist.ops.quantize import as_int4, as_int8
from qwen3_dist.weights import converter
from qwen3_dist.weights.converter import Conversion
from qwen3_dist.weights.files import shard_files
from serve_app.cli import main
from serve_app.cli.signals import exit_by_signals
from tests.checkpoints import write_checkpoint
from tests.quantized import fused, in_blocks, is_linear

SHAPE: dict[str, Any] = {
    "hidden_size": 200, "head_dim": 48, "num_hidden_layers": 2, "intermediate_size": 300,
    "moe_intermediate_size": 170, "num_experts": 4, "mlp_only_layers": [1],
}  # fmt: skip
WHOLE_GROUPS: dict[str, Any] = {
    "hidden_size": 256, "head_dim": 16, "intermediate_size": 384, "moe_intermediate_size": 128,
}  # fmt: skip
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=3)
PROMPTS = [list(range(3, 40)), [7, 1, 150]]


def written(tmp_path: Path, stacks: bool = False, **shape: Any) -> Path:
    path = write_checkpoint(tmp_path / "plain", **{"moe": True, **SHAPE, **shape})
    tensors = load_file(path / "model.safetensors")
    tensors = fused(tensors) if stacks else tensors
    narrow = {name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}
    save_file(narrow, path / "model.safetensors", {"format": "pt"})
    return path


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in shard_files(path):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def answers(path: Path, **settings: Any) -> list[Any]:
    with LLM(str(path), dtype="float32", num_blocks=16, use_tqdm=False, **settings) as llm:
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    return [(output.token_ids, output.logprobs) for output in outputs]


@pytest.mark.parametrize("stacks", [False, True], ids=["experts", "fused"])
def test_fp8_gives_the_bits_of_rounding_while_loading(tmp_path: Path, stacks: bool) -> None:
    path, out = written(tmp_path, stacks), tmp_path / "fp8"
    assert main(["quantize", str(path), "--to", "fp8", "--out", str(out)]) == 0
    assert answers(out) == answers(path, quantize="fp8")


def test_fp8_has_the_tensors_of_qwens_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converter, "SHARD_BYTES", 4 * 10**5)
    monkeypatch.setattr(converter, "TILE", 1)  # a row of blocks at a time
    path, out = written(tmp_path, tie_word_embeddings=True), tmp_path / "deep/fp8"
    (path / "additional_chat_templates").mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "additional_chat_templates/x.jinja", "merges.txt"):
        (path / name).write_text(name)
    assert main(["quantize", str(path), "--to", "fp8", "--out", str(out)]) == 0
    got, expected = tensors_of(out), tensors_of(path)
    for name, tensor in expected.items():
        if is_linear(name):
            codes, scales = in_blocks(tensor.float(), 128, 128)
            assert torch.equal(got[f"{name}_scale_inv"], scales)
            assert torch.equal(got.pop(name).float(), codes.float())
            assert got.pop(f"{name}_scale_inv").dtype == torch.float32
    assert got.keys() == {name for name in expected if not is_linear(name)}
    assert all(torch.equal(got[name], expected[name]) for name in got)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert all((out / shard).stat().st_size < 4.2e5 for shard in index["weight_map"].values())
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert settings["weight_block_size"] == [128, 128]
    assert settings["modules_to_not_convert"] == ["lm_head", "model.layers.0.mlp.gate"]
    copied = ("tokenizer.json", "chat_template.jinja", "additional_chat_templates/x.jinja", "merges.txt")
    assert [(out / name).read_text() for name in copied] == list(copied)
    assert (out / "generation_config.json").read_bytes() == (path / "generation_config.json").read_bytes()


def test_int8_has_the_scale_of_each_output(tmp_path: Path) -> None:
    path, out = written(tmp_path), tmp_path / "int8"
    assert main(["quantize", str(path), "--to", "int8", "--out", str(out)]) == 0
    got, plain = tensors_of(out), tensors_of(path)
    rounded = dict(plain)
    for name in filter(is_linear, plain):
        codes, scale = as_int8(plain[name])
        assert torch.equal(got[name], codes) and torch.equal(got[f"{name}_scale"], scale[:, None])
        rounded[name] = codes * scale[:, None]
    twin = Path(shutil.copytree(path, tmp_path / "twin"))
    save_file(rounded, twin / "model.safetensors", {"format": "pt"})
    for (tokens, logprobs), (others, theirs) in zip(answers(out), answers(twin), strict=True):
        assert tokens == others
        assert [each.logprob for each in logprobs] == pytest.approx([e.logprob for e in theirs], abs=1e-4)


@pytest.mark.parametrize("stacks", [False, True], ids=["experts", "fused"])
def test_int4_gives_the_bits_of_rounding_while_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stacks: bool
) -> None:
    monkeypatch.setattr(converter, "TILE", 1)  # 128 rows at a time
    path, out = written(tmp_path, stacks, **WHOLE_GROUPS), tmp_path / "int4"
    assert main(["quantize", str(path), "--to", "int4", "--out", str(out)]) == 0
    assert answers(out) == answers(path, quantize="int4")
    q = "model.layers.0.self_attn.q_proj.weight"
    shape = tensors_of(out)[f"{q}_shape"]
    assert shape.dtype == torch.int64 and shape.tolist() == [8 * 16, 256]


def test_compressed_tensors_reads_from_an_int4_weight_what_it_stands_for(tmp_path: Path) -> None:
    """`recorded` has a weight, what `quantize` made of it, and what compressed-tensors 0.20.1 decompressed that to
    with the settings in our config.json."""
    recorded = load_file(Path(__file__).parent.parent / "data/int4.safetensors")
    path, out, k = (
        written(tmp_path, **WHOLE_GROUPS),
        tmp_path / "int4",
        "model.layers.0.self_attn.k_proj.weight",
    )
    tensors = tensors_of(path)
    tensors[k] = recorded["weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    assert main(["quantize", str(path), "--to", "int4", "--out", str(out)]) == 0
    got = tensors_of(out)
    for end in ("packed", "scale", "shape"):
        assert torch.equal(got[f"{k}_{end}"], recorded[f"weight_{end}"])
    numbers, scales = as_int4(recorded["weight"].float())
    meant = (numbers.float() - 8) * scales.repeat_interleave(128, 1)
    assert torch.equal(recorded["decompressed"], meant.bfloat16())
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert settings["format"] == "pack-quantized"
    weights = settings["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (4, 128, True)


def test_groups_that_do_not_divide_a_weight_are_not_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path, out = written(tmp_path), tmp_path / "int4"
    assert main(["quantize", str(path), "--to", "int4", "--out", str(out)]) == 2
    assert "q_proj.weight has 200 inputs, which are no multiple of 128" in capsys.readouterr().err
    assert not out.exists()


def test_nothing_is_left_of_a_conversion_that_a_full_disk_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out, full = written(tmp_path), tmp_path / "out/fp8", []

    def fill(size: int) -> None:
        full.append(size)
        if len(full) == 5:
            assert [each.suffix for each in out.parent.iterdir()] == [".partial"]
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ResourceError, match="could not be written .*No space left on device"):
        Conversion.open(path, "fp8").write(out, fill)
    assert list(out.parent.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**6}))
    with pytest.raises(ResourceError, match=r"needs 0.07 GB and its disk has 0.00 GB free; make room"):
        Conversion.open(path, "fp8").write(out, fill)


@pytest.mark.parametrize("form", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, number: float
) -> None:
    path = written(tmp_path, **{**SHAPE, **WHOLE_GROUPS, "num_hidden_layers": 1, "mlp_only_layers": [0]})
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors = tensors_of(path)
    tensors[name].view(-1)[5] = number
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    assert main(["quantize", str(path), "--to", form, "--out", str(tmp_path / "new" / "out")]) == 2
    assert f"{name} has numbers that are infinite or none" in capsys.readouterr().err
    assert list((tmp_path / "new").iterdir()) == []


def test_nothing_is_left_of_a_conversion_that_a_signal_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out, before = written(tmp_path), tmp_path / "new" / "out", signal.getsignal(signal.SIGTERM)

    def stop(*_: Any) -> None:
        assert list(out.parent.iterdir())
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Conversion, "_write_shard", stop)
    with pytest.raises(SystemExit):
        main(["quantize", str(path), "--to", "fp8", "--out", str(out)])
    assert list(out.parent.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_is_ignored_stays_so() -> None:
    """nohup has SIGHUP ignored, for commands that go on after their terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with exit_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("exists", "exists and is not an empty directory; remove it or give another --out"),
        ("quantised", "are quantised already (fp8); give the bf16, fp16 or fp32 checkpoint"),
        ("cut", "is not a safetensors file, or its header is cut"),
    ],
)
def test_a_conversion_that_cannot_be_is_refused_before_it_writes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, damage: str, sentence: str
) -> None:
    path, out = written(tmp_path), tmp_path / "out"
    if damage == "exists":
        out.mkdir()
        (out / "config.json").write_text("mine")
    elif damage == "quantised":
        assert main(["quantize", str(path), "--to", "fp8", "--out", str(tmp_path / "first")]) == 0
        path = tmp_path / "first"
    else:
        (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:100])
    assert main(["quantize", str(path), "--to", "int8", "--out", str(out)]) == 2
    assert sentence in capsys.readouterr().err
    assert [each.read_text() for each in out.glob("*")] == (["mine"] if damage == "exists" else [])


def test_out_may_be_a_link_and_no_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, real = written(tmp_path), tmp_path / "real"
    real.mkdir()
    (tmp_path / "out").symlink_to("real")
    (path / "a_directory.json").mkdir()
    (path / "lost.txt").symlink_to("nowhere")
    command = ["quantize", str(path), "--to", "fp8", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(Path, "is_mount", lambda self: self == real)
    assert main(command) == 2
    assert "real is a mount point, which cannot be replaced; give --out a dir" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(command) == 0
    assert (real / "model.safetensors").exists() and (tmp_path / "out").is_symlink()


def test_an_embedding_model_keeps_its_names(tmp_path: Path) -> None:
    path, out = written(tmp_path), tmp_path / "fp8"
    tensors = tensors_of(path)
    del tensors["lm_head.weight"]
    headless = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(headless, path / "model.safetensors", {"format": "pt"})
    assert main(["quantize", str(path), "--to", "fp8", "--out", str(out)]) == 0
    assert {name.removesuffix("_scale_inv") for name in tensors_of(out)} == headless.keys()
    assert answers(out) == answers(path, quantize="fp8")
