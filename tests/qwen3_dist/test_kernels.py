"""The CPU kernels against plain torch, and what happens where they cannot be built."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_dist.model.rope import rope_tables
from qwen3_dist.ops.base import ExpertWeights, FeedForwardParts, LinearWeights, Matrix, NormWeights
from qwen3_dist.ops.batch import LayerCache
from qwen3_dist.ops.cpu import build
from qwen3_dist.ops.cpu.block_kernels import feed_forward_kernel
from qwen3_dist.ops.cpu.kernels import Kernels, load_kernels
from qwen3_dist.ops.cpu.structs import address
from qwen3_dist.ops.quantize import as_int8
from qwen3_dist.ops.torch_attention import gathered_attention
from qwen3_dist.ops.torch_ops import TorchOps, apply_rope
from tests.batches import random_batch

pytestmark = pytest.mark.usefixtures("two_threads")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.manual_seed(0)
    if build.library() is None:
        pytest.skip("no C++ compiler is here")
    yield request.param


def kernels(dtype: torch.dtype) -> Kernels:
    found = load_kernels(dtype)
    assert found is not None
    return found


def packed(
    dtype: torch.dtype, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> Matrix:
    return Matrix(kernels(dtype).pack(weight), len(weight), scale, bias)


def close(got: Tensor, expected: Tensor) -> bool:
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    return got.shape == expected.shape and bool(
        ((got.float() - expected).abs() <= TOLERANCE[got.dtype] * scale).all()
    )


@pytest.mark.parametrize(("inner", "outputs"), [(64, 96), (50, 33), (9, 130)])
def test_rows_of_a_packed_matrix_are_its_own(dtype: torch.dtype, inner: int, outputs: int) -> None:
    weight = torch.randn(outputs, inner).to(dtype)
    ids = torch.randint(0, outputs, (20,))
    assert torch.equal(kernels(dtype).packed_rows(kernels(dtype).pack(weight), ids, inner), weight[ids])


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 7, 12, 97, 200])
@pytest.mark.parametrize(("inner", "outputs"), [(64, 96), (50, 33), (1024, 7), (9, 130)])
def test_linear(dtype: torch.dtype, rows: int, inner: int, outputs: int) -> None:
    x, weight, bias = torch.randn(rows, inner), torch.randn(outputs, inner) / inner**0.5, torch.randn(outputs)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    for added in (None, bias):
        expected = F.linear(x.float(), weight.float(), None if added is None else added.float())
        assert close(kernels(dtype).linear(x, packed(dtype, weight, bias=added))[0], expected)


@pytest.mark.parametrize("rows", [1, 5, 200])
@pytest.mark.parametrize("biased", [False, True])
def test_several_products_of_the_same_rows(dtype: torch.dtype, rows: int, biased: bool) -> None:
    x = torch.randn(rows, 50).to(dtype)
    weights = [(torch.randn(n, 50) / 7).to(dtype) for n in (33, 1, 96)]
    biases = [torch.randn(len(w)).to(dtype) if biased else None for w in weights]
    got = kernels(dtype).linear(x, *(packed(dtype, w, bias=b) for w, b in zip(weights, biases, strict=True)))
    for out, weight, bias in zip(got, weights, biases, strict=True):
        assert close(out, F.linear(x.float(), weight.float(), None if bias is None else bias.float()))


@pytest.mark.parametrize("rows", [1, 3, 5, 200])
def test_norm_and_feed_forward_in_one_call(dtype: torch.dtype, rows: int) -> None:
    x = torch.randn(rows, 48).to(dtype)
    fc1, fc2 = (torch.randn(2, 37, 48) / 7).to(dtype)
    fc3 = (torch.randn(48, 37) / 6).to(dtype)
    scale, weights = torch.rand(48).to(dtype), [kernels(dtype).pack(fc) for fc in (fc1, fc2, fc3)]
    gate, up, down = (Matrix(weight, outputs) for weight, outputs in zip(weights, (37, 37, 48), strict=True))
    parts = FeedForwardParts(NormWeights(scale, 1e-6), LinearWeights((gate, up)), LinearWeights((down,)))
    kernel, out = feed_forward_kernel(parts), torch.empty_like(x)
    kernels(dtype).run("feed_forward_kernel", address(kernel), x, out, rows)
    normed = kernels(dtype).norm(x, scale, 1e-6).float()
    hidden = F.silu(normed @ fc1.float().T) * (normed @ fc2.float().T)
    assert close(out, hidden @ fc3.float().T)


@pytest.mark.parametrize("columns", [1, 64, 150, 1000])
def test_largest_of_blocks(dtype: torch.dtype, columns: int) -> None:
    x = torch.randn(3, columns).to(dtype)
    x[1] = -torch.inf
    padded = F.pad(x, (0, -columns % 64), value=-torch.inf)
    assert torch.equal(kernels(dtype).block_max(x, 64), padded.unflatten(1, (-1, 64)).amax(dim=-1).float())


@pytest.mark.parametrize("columns", [1, 150, 4097, 20000])
def test_likeliest(dtype: torch.dtype, columns: int) -> None:
    x = torch.randn(40, columns + 3).to(dtype)[:, :columns]  # as a padded vocabulary's logits lie
    x[1] = -torch.inf
    x[2] = x[2].max()
    x[3, -1] = x[3].max() + 1
    expected = [row.eq(row.max()).nonzero()[0].item() for row in x]
    assert kernels(dtype).argmax(x).tolist() == expected


@pytest.mark.parametrize("rows", [1, 3, 5, 13, 30, 37, 200])
@pytest.mark.parametrize(("inner", "outputs"), [(64, 96), (50, 33), (300, 130)])
def test_linear_with_int8_weights(dtype: torch.dtype, rows: int, inner: int, outputs: int) -> None:
    x, bias = torch.randn(rows, inner).to(dtype), torch.randn(outputs).to(dtype)
    weight, scale = as_int8(torch.randn(outputs, inner))
    expected = x.float() @ (weight * scale[:, None]).T + bias.float()
    assert close(kernels(dtype).linear(x, packed(dtype, weight, scale, bias))[0], expected)


@pytest.mark.parametrize("rows", [3, 100])
def test_int8_weights_do_not_overflow_fp16(rows: int) -> None:
    """Whose largest number is 65504; whole integers of this row add up to 127 * 1024."""
    weight, scale = as_int8(torch.full((8, 1024), 0.01))
    x = torch.ones(rows, 1024, dtype=torch.float16)
    (out,) = TorchOps().linear(x, LinearWeights((Matrix(weight, 8, scale),)))
    torch.testing.assert_close(out, torch.full((rows, 8), 10.24).half(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("rows", [1, 40])
def test_experts_with_int8_weights(dtype: torch.dtype, rows: int) -> None:
    x, weights = torch.randn(rows, 48).to(dtype), torch.rand(rows, 2)
    ids = torch.randint(-1, 4, (rows, 2))
    shapes = ((4, 37, 48), (4, 37, 48), (4, 48, 37))
    stacks, scales = zip(*(as_int8(torch.randn(shape) / 7) for shape in shapes), strict=True)
    wide = tuple((stack * scale[..., None]) for stack, scale in zip(stacks, scales, strict=True))
    expected = TorchOps().experts(
        x.float(), ExpertWeights(wide, 37), ids, weights, torch.zeros(5, dtype=torch.int64)
    )
    packed = ExpertWeights(tuple(map(kernels(dtype).pack, stacks)), 37, scales)
    assert close(kernels(dtype).experts(x, packed, ids, weights), expected)


@pytest.mark.parametrize("rows", [0, 1, 5, 300])
def test_experts(dtype: torch.dtype, rows: int) -> None:
    experts, dim, columns, choices = 6, 48, 37, 3
    fc1, fc2 = (torch.randn(2, experts, columns, dim) / dim**0.5).to(dtype)
    fc3 = (torch.randn(experts, dim, columns) / columns**0.5).to(dtype)
    x, weights = torch.randn(rows, dim).to(dtype), torch.rand(rows, choices)
    ids = torch.randint(-1, experts - 1, (rows, choices))  # the last expert is never chosen
    expected = torch.zeros(rows, dim)
    for row in range(rows):
        for choice, expert in enumerate(ids[row].tolist()):
            if expert >= 0:
                wide = x[row].float()
                hidden = F.silu(fc1[expert].float() @ wide) * (fc2[expert].float() @ wide)
                expected[row] += weights[row, choice] * (fc3[expert].float() @ hidden)
    pack = kernels(dtype).pack
    stacks = ExpertWeights((pack(fc1), pack(fc2), pack(fc3)), columns)
    got = kernels(dtype).experts(x, stacks, ids, weights)
    assert close(got, expected)


@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("block_size", [4, 16, 32])
@pytest.mark.parametrize(
    ("heads", "groups", "dim"), [(4, 4, 16), (8, 2, 24), (8, 4, 128), (8, 1, 128), (3, 1, 20), (128, 1, 8)]
)
def test_attention(
    dtype: torch.dtype, heads: int, groups: int, dim: int, block_size: int, window: int | None
) -> None:
    batch = random_batch((1, 150, 17, 9, 50, 330), (1, 1, 1, 9, 23, 190), block_size, num_blocks=256)
    cache = LayerCache(*torch.randn(2, 256, block_size, groups, dim).to(dtype))
    q = torch.randn(225, heads, dim).to(dtype)
    where = (batch.block_tables, batch.table_rows, batch.context_lens, batch.query_starts)
    wide = LayerCache(cache.keys.float(), cache.values.float())
    got = kernels(dtype).attention(q, cache, *where, window)
    assert close(got, gathered_attention(q.float(), wide, batch, window))


@pytest.mark.parametrize("normed", [True, False])
def test_rotation_with_norms_into_the_cache(dtype: torch.dtype, normed: bool) -> None:
    tokens, heads, groups, dim = 7, 6, 2, 32
    q, k, v = (torch.randn(tokens, n, dim).to(dtype) for n in (heads, groups, groups))
    scales = (torch.rand(dim).to(dtype), torch.rand(dim).to(dtype)) if normed else None
    cos, sin = rope_tables(torch.arange(3, 3 + tokens), torch.rand(dim // 2), 1.0, dtype)
    slots = torch.randperm(20)[:tokens]

    def norm(x: Tensor, which: int) -> Tensor:
        if scales is None:
            return x
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return wide.to(dtype) * scales[which]

    expected_q, expected_k = apply_rope(norm(q, 0), cos, sin), apply_rope(norm(k, 1), cos, sin)
    keys, values = torch.zeros(2, 5, 4, groups, dim).to(dtype)
    kernels(dtype).rotate(q, k, v, LayerCache(keys, values), scales, cos, sin, slots, 1e-6)
    assert close(q, expected_q.float())
    assert close(keys.flatten(0, 1)[slots], expected_k.float())
    assert torch.equal(values.flatten(0, 1)[slots], v)


def test_norm_rounds_as_torch_does(dtype: torch.dtype) -> None:
    x, scale = torch.randn(9, 70).to(dtype), torch.rand(70).to(dtype)
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype) * scale
    assert close(kernels(dtype).norm(x, scale, 1e-6), normed.float())


def test_processes_that_start_together_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "bin" / "g++"  # tells of each call, takes its time and writes what it was asked for
    compiler.parent.mkdir()
    compiler.write_text(
        """#!/bin/sh
test "$1" = --version && exit
echo "$$" >> "$CALLS"
sleep 0.5
while test "$1" != -o; do shift; done
touch "$2"
"""
    )
    compiler.chmod(0o700)
    monkeypatch.setenv("PATH", f"{compiler.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = [sys.executable, "-m", "qwen3_dist.ops.cpu"]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = {process.communicate(timeout=240)[1].strip() for process in running}
    built = [file.name for file in (tmp_path / "qwen3_dist").glob("*.so")]
    assert len(built) == 1 and said == {f"kernels: {built[0]}"}
    assert len((tmp_path / "calls").read_text().splitlines()) == 2  # one compiles, one links


@pytest.mark.parametrize("failure", ["absent", "broken"])
def test_without_a_working_compiler_torch_serves_and_one_line_says_so(
    failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build.shutil, "which", lambda name: None if failure == "absent" else "/bin/false")
    build.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert build.library() is None
        assert len(caplog.records) == 1 and "plain torch" in caplog.text
    finally:
        build.library.cache_clear()


def test_kernels_are_built_beside_compiled_python(
    fast_build: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sources = tmp_path / "sources"
    shutil.copytree(build._SOURCES, sources, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(build, "_SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(fast_build))
    built = build.library()
    (sources / "__pycache__").mkdir()
    (sources / "__pycache__" / "kernels.pyc").touch()
    build.library.cache_clear()
    assert built is not None and build.library() == built
    (sources / "cpu.cpp").write_text("// another source")
    build.library.cache_clear()
    assert build.library() not in (None, built)


@pytest.fixture
def fast_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A compiler that makes empty libraries, no home, and the folder for temporary files."""
    monkeypatch.setattr(build.shutil, "which", lambda name: "/bin/true")
    monkeypatch.setattr(build, "_build", lambda compiler, flags, built: built.touch())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "tmp").mkdir()
    build.library.cache_clear()
    yield tmp_path / "tmp"
    build.library.cache_clear()


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_a_user_without_a_home_builds_into_a_private_folder(
    fast_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", no_home)
    built = build.library()
    assert built is not None and built.parent == fast_build / f"qwen3_dist-{os.getuid()}"
    assert built.parent.stat().st_mode & 0o777 == 0o700
    build.library.cache_clear()
    assert build.library() == built


def test_a_cache_that_cannot_be_made_is_replaced_by_a_private_folder(
    fast_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fast_build / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(fast_build / "file"))
    built = build.library()
    assert built is not None and built.parent == fast_build / f"qwen3_dist-{os.getuid()}"


def test_a_folder_that_others_may_write_to_is_not_trusted(
    fast_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", no_home)
    open_to_all = fast_build / f"qwen3_dist-{os.getuid()}"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    built = build.library()
    assert built is not None and built.parent != open_to_all


def test_kernels_in_a_cache_that_cannot_be_written_are_used(
    fast_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(fast_build))
    built = build.library()
    assert built is not None and built.parent == fast_build / "qwen3_dist"
    build.library.cache_clear()
    monkeypatch.setattr(build, "_is_writable", lambda folder: False)
    assert build.library() == built
