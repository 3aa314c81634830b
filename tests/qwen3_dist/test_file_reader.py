"""What the kernel is told of reads, and how many files are open."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwen3_dist.weights import file_reader, read_runs
from qwen3_dist.weights.files import CheckpointFiles


def test_few_of_many_small_files_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(30):
        save_file({f"x{i}": torch.full((4,), float(i))}, tmp_path / f"model-{i + 1:05}-of-00030.safetensors")
    monkeypatch.setattr(read_runs, "_THREADS", 1)
    open_files: list[int] = []

    def read(descriptor: int, memory: list[memoryview], start: int) -> int:
        open_files.append(sum(file.resolve().parent == tmp_path for file in Path("/proc/self/fd").iterdir()))
        return preadv(descriptor, memory, start)

    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", read)
    found = torch.empty(30, 4)
    regions = [read_runs.Region(f"x{i}", (slice(None),), out) for i, out in enumerate(found)]
    read_runs.read_regions(CheckpointFiles(tmp_path), regions, lambda size: None)
    assert found[:, 0].tolist() == list(range(30))
    assert len(open_files) == 30 and max(open_files) <= 9


@pytest.mark.parametrize("fails", [False, True])
def test_the_kernel_is_told_in_pieces_that_it_heeds_and_need_not_know_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    stored = torch.randn(300)
    save_file({"x": stored}, tmp_path / "model.safetensors")
    monkeypatch.setattr(file_reader, "_ADVICE_BYTES", 512)
    told: list[tuple[int, int]] = []

    def advise(descriptor: int, start: int, size: int, advice: int) -> None:
        told.append((start, size))
        if fails:
            raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "posix_fadvise", advise)
    assert torch.equal(CheckpointFiles(tmp_path).read_whole("x"), stored)
    first = told[0][0]
    assert told == ([(first, 512)] if fails else [(first, 512), (first + 512, 512), (first + 1024, 176)])
