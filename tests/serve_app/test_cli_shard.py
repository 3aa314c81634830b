"""`shard` writes what each rank reads into a file of its own, and every layout reads the result."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3_dist.config import ModelConfig
from qwen3_dist.errors import CheckpointError
from qwen3_dist.layout import Layout
from qwen3_dist.weights import new_checkpoint, sharder
from qwen3_dist.weights.file_reader import FileReader
from qwen3_dist.weights.files import CheckpointFiles, shard_files
from qwen3_dist.weights.weight_plan import WeightPlan
from serve_app.cli import main
from tests.checkpoints import write_checkpoint
from tests.quantized import write_fp8
from tests.quantized_packed import write_awq

AWKWARD: dict[str, Any] = {"num_experts": 9, "moe_intermediate_size": 45, "intermediate_size": 99}
LAYOUTS = {
    "dense": ["tp=1", "tp=2", "tp=4", "tp=2,pp=2"],
    "moe": ["tp=1", "tp=4", "tp=2,ep=2", "dp=2,pp=2,ep=2"],
    "fp8": ["tp=1", "tp=4", "tp=2,ep=2"],
}


def sharded(path: Path, layout: str, out: Path) -> Path:
    assert main(["shard", str(path), "--layout", layout, "--out", str(out)]) == 0
    return out


def regions(path: Path, layout: str) -> dict[tuple[int, str, str], torch.Tensor]:
    """What each rank reads, as it is stored."""
    files, parsed = CheckpointFiles(path), Layout.parse(layout)
    plan = WeightPlan(ModelConfig.from_directory(path), parsed, files.names())
    return {
        (rank, piece.source, str(piece.index)): files.take(piece.source, piece.index)
        for rank in range(parsed.world)
        for piece in plan.pieces(parsed.coords(rank))
        if files.shape(piece.source) == piece.shape
    }


@pytest.mark.parametrize(("kind", "layout"), [(kind, each) for kind in LAYOUTS for each in LAYOUTS[kind]])
def test_every_layout_reads_what_another_was_sharded_for(tmp_path: Path, kind: str, layout: str) -> None:
    if kind == "fp8":
        path = write_fp8(tmp_path, 16, 24, moe=True, **AWKWARD).quantized
    else:
        path = write_checkpoint(tmp_path, moe=kind == "moe", **AWKWARD)
    out = sharded(path, layout, tmp_path / "sharded")
    assert CheckpointFiles(out).names() == CheckpointFiles(path).names()
    for wanted in LAYOUTS[kind]:
        found, expected = regions(out, wanted), regions(path, wanted)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_scales_that_one_rank_reads_whole_lie_in_one_place(tmp_path: Path) -> None:
    path = write_fp8(
        tmp_path, 128, 128, moe=False, intermediate_size=200
    ).quantized  # blocks of 128 and 72 outputs
    out = sharded(path, "tp=2", tmp_path / "sharded")
    for wanted in ("tp=1", "tp=2"):
        found, expected = regions(out, wanted), regions(path, wanted)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_checkpoint_without_a_head_stays_one(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "whole", moe=False, tie_word_embeddings=False)
    tensors = load_file(path / "model.safetensors")
    tensors = {name.removeprefix("model."): each for name, each in tensors.items() if "lm_head" not in name}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    out = sharded(path, "tp=2", tmp_path / "sharded")
    files = CheckpointFiles(out)
    assert files.is_headless and files.names() == CheckpointFiles(path).names()
    for name in files.names():
        assert torch.equal(files.read_whole(name), CheckpointFiles(path).read_whole(name))


def test_a_rank_reads_its_file_from_the_beginning_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_checkpoint(tmp_path / "whole", moe=True)
    out = sharded(path, "tp=2,ep=2", tmp_path / "sharded")
    assert [file.name for file in shard_files(out)] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    read: list[tuple[str, int]] = []
    real = FileReader._read_bytes

    def noted(self: FileReader, file: Path, start: int, address: int, size: int) -> None:
        read.append((file.name, size))
        real(self, file, start, address, size)

    monkeypatch.setattr(FileReader, "_read_bytes", noted)
    files, layout = CheckpointFiles(out), Layout.parse("tp=2,ep=2")
    plan = WeightPlan(ModelConfig.from_directory(out), layout, files.names())
    wanted = sum(files.take(each.source, each.index).nbytes for each in plan.pieces(layout.coords(1)))
    assert sum(size for _, size in read) == wanted  # not a byte beside its own
    own = sum(size for name, size in read if name.startswith("model-00002"))
    assert own == sum(
        tensor.nbytes for tensor in load_file(out / "model-00002-of-00002.safetensors").values()
    )


def test_small_steps_write_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_checkpoint(tmp_path / "whole", moe=False)
    whole = sharded(path, "tp=2", tmp_path / "a")
    monkeypatch.setattr(sharder, "_STEP_BYTES", 100)
    stepwise = sharded(path, "tp=2", tmp_path / "b")
    for one, other in zip(shard_files(whole), shard_files(stepwise), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_what_cannot_be_sharded_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_checkpoint(tmp_path / "whole", moe=False)
    packed = write_awq(tmp_path / "packed", moe=False).quantized

    def refused(*arguments: str) -> str:
        assert main(["shard", *arguments]) == 2
        return capsys.readouterr().err

    out = str(tmp_path / "out")
    assert "tp=64" in refused(str(path), "--layout", "tp=64", "--out", out)
    assert "not an empty directory" in refused(str(path), "--layout", "tp=2", "--out", str(path))
    assert "packed numbers, which shard does not cut" in refused(
        str(packed), "--layout", "tp=2", "--out", out
    )

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(new_checkpoint.os, "fsync", full)
    assert "No space left on device" in refused(str(path), "--layout", "tp=2", "--out", out)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["packed", "whole"]


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    out = sharded(write_checkpoint(tmp_path / "whole", moe=False), "tp=2", tmp_path / "sharded")
    _, second = shard_files(out)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing"):
        CheckpointFiles(out)


def test_shards_of_two_layouts_leave_no_hole_unseen(tmp_path: Path) -> None:
    """Parts of a mixture overlap, and have as many numbers together as the whole has, or more."""
    path = write_checkpoint(tmp_path / "whole", moe=True, num_hidden_layers=1, num_experts=8)
    out, other = (sharded(path, layout, tmp_path / layout) for layout in ("tp=4", "tp=2,dp=2,ep=2"))
    shutil.copy(other / "model-00002-of-00004.safetensors", out / "model-00003-of-00004.safetensors")
    with pytest.raises(CheckpointError, match=r"a part of model\.\S+ is missing; shard the checkpoint again"):
        CheckpointFiles(out)
