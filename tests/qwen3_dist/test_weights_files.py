"""Finding a checkpoint and reading slices of its files; every kind of damage is named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwen3_dist import LLM
from qwen3_dist.engine import engine as engine_module
from qwen3_dist.errors import CheckpointError
from qwen3_dist.weights import file_reader, hub, read_runs
from qwen3_dist.weights import files as files_module
from qwen3_dist.weights.files import CheckpointFiles
from qwen3_dist.weights.source import bundled_path, commit_of, resolve_model
from serve_app.launch.model_check import check_model
from serve_app.settings import read_service_config
from tests.checkpoints import write_checkpoint
from tests.damage import (
    give_two_tensors_the_same_bytes,
    lose_what_a_link_points_to,
    name_a_million_million_shards,
    name_a_tensor_twice,
    nest_a_header_deeply,
    put_a_pipe_in_its_place,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_file({"a": torch.randn(70, 6), "b": torch.randn(4, 5, 6).bfloat16()}, tmp_path / "x.safetensors")
    save_file({"c": torch.arange(3)}, tmp_path / "y.safetensors")
    return tmp_path


def truncate(folder: Path) -> None:
    file = folder / "x.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def write_garbage(folder: Path) -> None:
    (folder / "x.safetensors").write_text("<html>not found</html>")


def name_an_absent_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "x.safetensors", "z": "z.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def name_an_absent_tensor(folder: Path) -> None:
    index = {"weight_map": {"a": "x.safetensors", "z": "x.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def break_the_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")


def name_two_files_of_a_tensor(folder: Path) -> None:
    text = '{"weight_map": {"a": "x.safetensors", "c": "y.safetensors", "a": "y.safetensors"}}'
    (folder / "model.safetensors.index.json").write_text(text)


def lose_the_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").symlink_to("nowhere")


def name_a_file_outside(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')


def lose_a_shard(folder: Path) -> None:
    (folder / "x.safetensors").rename(folder / "model-00001-of-00003.safetensors")
    (folder / "y.safetensors").rename(folder / "model-00003-of-00003.safetensors")


def mix_two_checkpoints(folder: Path) -> None:
    (folder / "x.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "y.safetensors").rename(folder / "model-00001-of-00002.safetensors")


def hold_a_tensor_twice(folder: Path) -> None:
    save_file({"a": torch.zeros(70, 6)}, folder / "z.safetensors")


def keep_only_an_adapter(folder: Path) -> None:
    (folder / "x.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "y.safetensors").unlink()


def keep_only_pickles(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))


def keep_only_gguf(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.rename(file.with_suffix(".gguf"))


def keep_nothing(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (truncate, r"x\.safetensors has \d+ bytes where its header asks for \d+"),
        (write_garbage, r"x\.safetensors is not a safetensors file"),
        (name_an_absent_shard, r"z\.safetensors is missing although the index names it"),
        (name_an_absent_tensor, r"x\.safetensors lacks z although the index names it"),
        (break_the_index, r"index\.json is not a valid weight index"),
        (name_a_file_outside, r"index\.json is not a valid weight index"),
        (name_two_files_of_a_tensor, r"index\.json is not a valid weight index"),
        (lose_the_index, r"index\.json is not a valid weight index"),
        (put_a_pipe_in_its_place, r"x\.safetensors cannot be read .it is no file.; make it readable or"),
        (lose_what_a_link_points_to, r"x\.safetensors cannot be read .No such file or directory."),
        (give_two_tensors_the_same_bytes, r"x\.safetensors is not a safetensors file"),
        (name_a_tensor_twice, r"x\.safetensors is not a safetensors file"),
        (nest_a_header_deeply, r"x\.safetensors is not a safetensors file"),
        (name_a_million_million_shards, r"model-000000000001-of-999999999999\.safetensors is missing"),
        (lose_a_shard, r"model-00002-of-00003\.safetensors is missing"),
        (mix_two_checkpoints, "holds shards of several checkpoints"),
        (hold_a_tensor_twice, r"x\.safetensors and z\.safetensors both hold a, and no index"),
        (keep_only_an_adapter, r"holds no \*\.safetensors file"),
        (
            keep_only_pickles,
            r"no \*\.safetensors file of a model; x.bin is a pickle, .* AutoModelForCausalLM.*, and copy the tok",
        ),
        (keep_only_gguf, r"x.gguf is of llama.cpp's format, so fetch the checkpoint that it was made from"),
        (keep_nothing, r"no \*\.safetensors file of a model; fetch the weights in that format"),
    ],
)
def test_damage_is_named_with_its_file(folder: Path, damage: Callable[[Path], None], sentence: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=sentence):
        CheckpointFiles(folder)


def test_a_cut_file_is_named_before_ranks_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "make_executor", None)
    path = write_checkpoint(tmp_path, moe=False)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"model\.safetensors has \d+ bytes where"):
        LLM(str(path), layout="tp=2", use_tqdm=False)
    file.rename(path / "pytorch_model.bin")
    for start in (
        lambda: LLM(str(path), use_tqdm=False),
        lambda: check_model(read_service_config({"model": str(path)}).models[0]),
    ):
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
            start()


def first_of(folder: Path, name: str = "a") -> float:
    out = torch.empty(1)
    CheckpointFiles(folder).read(name, (slice(0, 1),), out)
    return float(out)


@pytest.mark.parametrize("stray", ["model-00002-of-00002", "zz", "adapter_model", "consolidated", "a"])
def test_a_tensor_is_read_from_the_file_that_the_index_names(tmp_path: Path, stray: str) -> None:
    """A stale copy in another shard or a file that the index does not know is not read."""
    ours, index = "model-00001-of-00002.safetensors", {"a": "model-00001-of-00002.safetensors"}
    save_file({"a": torch.ones(1)}, tmp_path / ours)
    save_file({"a": torch.zeros(1), "b": torch.ones(1)}, tmp_path / f"{stray}.safetensors")
    if stray == "model-00002-of-00002":
        index["b"] = f"{stray}.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert first_of(tmp_path) == 1
    assert CheckpointFiles(tmp_path).names() == index.keys()


@pytest.mark.parametrize("stray", ["zz", "adapter_model", "consolidated", "model-00001-of-00002", "a"])
def test_without_an_index_model_safetensors_is_all_there_is(tmp_path: Path, stray: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    save_file({"a": torch.zeros(1), "b": torch.ones(1)}, tmp_path / f"{stray}.safetensors")
    assert first_of(tmp_path) == 1
    assert CheckpointFiles(tmp_path).names() == {"a"}


@pytest.mark.parametrize("stray", ["zz", "adapter_model", "consolidated", "training_args"])
def test_shards_without_an_index_are_read_alone(tmp_path: Path, stray: str) -> None:
    for number, name in enumerate("ab", 1):
        save_file({name: torch.ones(1)}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / f"{stray}.safetensors")
    assert first_of(tmp_path) == first_of(tmp_path, "b") == 1
    assert CheckpointFiles(tmp_path).names() == {"a", "b"}


def test_a_tensor_that_is_no_float_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"c in .*y\.safetensors is stored as I64"):
        CheckpointFiles(folder).read("c", (slice(None),), torch.empty(3))


@pytest.mark.parametrize("min_bytes", [1, 20, 1 << 16])
@pytest.mark.parametrize("chunk_bytes", [1, 100, 1 << 20])
def test_slices_read_in_chunks_equal_those_of_the_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, min_bytes: int
) -> None:
    monkeypatch.setattr(file_reader, "_CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(file_reader, "_MIN_BYTES", min_bytes)
    monkeypatch.setattr(file_reader, "AHEAD_BYTES", 300)
    files = CheckpointFiles(folder)
    torch.manual_seed(0)
    a, b = torch.randn(70, 6), torch.randn(4, 5, 6).bfloat16().float()
    for name, whole, index in [
        ("a", a, (slice(None),)),
        ("a", a, (slice(13, 57),)),
        ("a", a, (slice(None), slice(2, 5))),
        ("b", b, (slice(1, 3), slice(2, 4), slice(None))),
        ("b", b, (slice(0, 4), slice(None), slice(5, 6))),
    ]:
        shape = whole[index].shape
        for out in (torch.empty(shape), torch.empty(*shape[:-1], 9)[..., 1 : 1 + shape[-1]]):
            told: list[int] = []
            files.read(name, index, out, told.append)
            assert torch.equal(out, whole[index])
            assert sum(told) == out.numel()
        assert torch.equal(files.take(name, index).float(), whole[index])
    assert torch.equal(files.take("b", (2, slice(1, 3))).float(), b[2, 1:3])
    assert (files.shape("b"), files.dtype("b")) == ((4, 5, 6), "bfloat16")


def test_the_kernel_is_told_of_each_read_before_it_and_of_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = {f"x{i}": torch.randn(50, 4) for i in range(4)}
    for i, (name, tensor) in enumerate(stored.items()):
        save_file({name: tensor}, tmp_path / f"model-{i + 1:05}-of-00004.safetensors")
    monkeypatch.setattr(file_reader, "_CHUNK_BYTES", 160)
    monkeypatch.setattr(file_reader, "_MIN_BYTES", 1)
    monkeypatch.setattr(file_reader, "AHEAD_BYTES", 200)
    monkeypatch.setattr(read_runs, "_THREADS", 1)
    waiting: list[tuple[Path, int, int]] = []  # announced and not read
    open_files: list[int] = []

    def file_of(descriptor: int) -> Path:
        return Path(f"/proc/self/fd/{descriptor}").resolve()

    def announced(descriptor: int, start: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        waiting.append((file_of(descriptor), start, size))
        assert sum(size for *_, size in waiting) <= 200 + 8

    def read(descriptor: int, memory: list[memoryview], start: int) -> int:
        assert waiting.pop(0) == (file_of(descriptor), start, len(memory[0]))
        open_files.append(sum(file.resolve().parent == tmp_path for file in Path("/proc/self/fd").iterdir()))
        return preadv(descriptor, memory, start)

    preadv = os.preadv
    monkeypatch.setattr(os, "posix_fadvise", announced)
    monkeypatch.setattr(os, "preadv", read)
    files, rows = CheckpointFiles(tmp_path), slice(5, 45)
    found = {name: torch.empty(40, 2) for name in stored}
    halves = [read_runs.Region(name, (rows, slice(2)), out) for name, out in found.items()]
    read_runs.read_regions(files, halves, lambda size: None)
    assert all(torch.equal(found[name], stored[name][rows, :2]) for name in stored)
    assert not waiting and len(open_files) == 4 * 40 and set(open_files) == {1, 2}


def test_a_checkpoint_of_very_many_tensors_opens_each_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({f"t{i}": torch.zeros(1) for i in range(36_000)}, tmp_path / "x.safetensors")
    opened = 0
    real = files_module._read_header

    def counting(file: Path) -> tuple[dict[str, dict[str, object]], int]:
        nonlocal opened
        opened += 1
        return real(file)

    monkeypatch.setattr(files_module, "_read_header", counting)
    assert len(CheckpointFiles(tmp_path).names()) == 36_000
    assert opened == 1


def test_a_model_is_the_bundled_one_a_directory_or_a_hub_id(tmp_path: Path) -> None:
    assert resolve_model("") == bundled_path()
    assert resolve_model(str(tmp_path)) == tmp_path
    for neither in (str(tmp_path / "nothing"), "./org/name", "no-slash", str(Path(__file__))):
        with pytest.raises(
            CheckpointError,
            match="is neither a directory that exists nor bundled|is a file; give the directory",
        ):
            resolve_model(neither)


def test_a_home_that_is_not_there_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "~/.cache/huggingface/hub")
    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(
        CheckpointError, match="'org/name' is a hub id and this user has no home .* set HF_HOME"
    ):
        hub.require_cache("org/name")
    with pytest.raises(CheckpointError, match="this user has no home; give the whole path"):
        resolve_model("~/model")


def test_a_hub_id_is_taken_from_the_local_cache_at_its_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo, commit = tmp_path / "models--org--name", "a" * 40
    snapshot = write_checkpoint(repo / "snapshots" / commit, moe=False)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    (repo / "refs" / "v1").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve_model("org/name").samefile(snapshot)
    assert resolve_model("org/name", "v1").samefile(snapshot)
    for model, revision in (("org/name", "v2"), ("org/other", None)):
        with pytest.raises(CheckpointError, match="not in the local hub cache"):
            resolve_model(model, revision)


@pytest.mark.parametrize("lost", [None, "config.json", "model.safetensors"])
def test_a_commit_that_the_cache_has_whole_is_taken_without_asking_the_hub(
    lost: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "a" * 40
    snapshot = write_checkpoint(tmp_path / "models--org--name" / "snapshots" / commit, moe=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    asked: list[str] = []

    def ask(model: str, revision: str | None, *others: object) -> Path:
        asked.append(f"{model} at {revision}")
        return snapshot

    monkeypatch.setattr(hub, "download", ask)
    if lost is not None:
        (snapshot / lost).unlink()
    assert resolve_model("org/name", commit).samefile(snapshot)
    assert asked == ([] if lost is None else [f"org/name at {commit}"])
    resolve_model("org/name", "main")
    assert asked[-1] == "org/name at main"  # a branch moves on
    assert commit_of("org/name", snapshot) == commit
    assert commit_of(str(snapshot), snapshot) is None and commit_of("", bundled_path()) is None
