"""Every `Ops` against `TorchOps`: each operation, in each dtype, with plain weights and with int8 ones.

Triton's kernels are run by its interpreter, which multiplies the bits of bf16: products of these are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from qwen3_dist.ops.base import DrawSettings, ExpertWeights, LinearWeights, Matrix, NormWeights, Ops
from qwen3_dist.ops.batch import LayerCache
from qwen3_dist.ops.choose import choose_ops
from qwen3_dist.ops.cpu.ops import CpuOps
from qwen3_dist.ops.cuda.attention import Backend, Chosen, triton
from qwen3_dist.ops.cuda.kernels import GpuKernels
from qwen3_dist.ops.cuda.ops import CudaOps
from qwen3_dist.ops.torch_ops import TorchOps
from tests.batches import random_batch

pytestmark = pytest.mark.usefixtures("two_threads")

CPU, TORCH = torch.device("cpu"), TorchOps()
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2**-8, torch.bfloat16: 2**-5}


def ops_of(kind: str, dtype: torch.dtype) -> Ops:
    if kind == "cpu":
        ops = choose_ops(CPU, dtype)
        if not isinstance(ops, CpuOps):
            pytest.skip("no C++ compiler is here")
        return ops
    kernels = dict.fromkeys((dtype, torch.float32), GpuKernels() if kind == "triton" else None)
    attention = Chosen(Backend("Triton", triton), ())
    return CudaOps(CPU, dtype, kernels, attention, grouped_mm=kind == "grouped_mm")


ROWS = [
    ("cpu", torch.float32),
    ("cpu", torch.bfloat16),
    ("triton", torch.float32),
    ("triton", torch.bfloat16),
]
PRODUCTS = [*ROWS[:3], ("triton", torch.float16)]


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def close(got: Tensor, expected: Tensor) -> None:
    error = TOLERANCE[expected.dtype]
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, atol=error, rtol=error)


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype)


def linear_weights(outputs: Sequence[int], inner: int, dtype: torch.dtype, biased: bool) -> LinearWeights:
    return LinearWeights(
        tuple(
            Matrix(
                drawn(each, inner, dtype=dtype), each, bias=torch.randn(each).to(dtype) if biased else None
            )
            for each in outputs
        )
    )


@pytest.mark.parametrize(("kind", "dtype"), PRODUCTS)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("outputs", [(40,), (40, 7, 33)])
@pytest.mark.parametrize("rows", [0, 1, 5, 80])
def test_linear(
    kind: str, dtype: torch.dtype, int8: bool, biased: bool, outputs: tuple[int, ...], rows: int
) -> None:
    ops, plain = ops_of(kind, dtype), linear_weights(outputs, 64, dtype, biased)
    x = torch.randn(rows, 64).to(dtype)
    expected = TORCH.linear(x, TORCH.finalize_linear(plain, int8))
    for got, each in zip(ops.linear(x, ops.finalize_linear(plain, int8)), expected, strict=True):
        close(got, each)
    for got, each in zip(ops.linear(x, plain), TORCH.linear(x, plain), strict=True):  # not finalized
        close(got, each)


@pytest.mark.parametrize(("kind", "dtype"), ROWS)
def test_embedding(kind: str, dtype: torch.dtype) -> None:
    ops, plain, ids = ops_of(kind, dtype), linear_weights((33,), 50, dtype, False), torch.randint(0, 33, (9,))
    assert ops.embedding(ids, ops.finalize_linear(plain, False)).equal(TORCH.embedding(ids, plain))


@pytest.mark.parametrize(("kind", "dtype"), ROWS)
@pytest.mark.parametrize("option", ["plain", "shift", "not qwen3_compatible"])
@pytest.mark.parametrize("shape", [(5, 96), (3, 2, 64), (0, 64)])
def test_norm(kind: str, dtype: torch.dtype, option: str, shape: tuple[int, ...]) -> None:
    x, scale = 3 * torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    shift = torch.randn(shape[-1]).to(dtype) if option == "shift" else None
    weights = NormWeights(scale, 1e-6, shift, option != "not qwen3_compatible")
    close(ops_of(kind, dtype).norm(x, weights), TORCH.norm(x, weights))


@pytest.mark.parametrize(("kind", "dtype"), ROWS)
@pytest.mark.parametrize("norm", ["none", "plain", "shift"])
def test_rotate_and_store(kind: str, dtype: torch.dtype, norm: str) -> None:
    tokens, heads, groups, dim = 5, 6, 2, 24
    q, k, v = (torch.randn(tokens, count, dim).to(dtype) for count in (heads, groups, groups))
    angles = torch.randn(tokens, 1, dim // 2).repeat(1, 1, 2)
    cos, sin, slots = angles.cos().to(dtype), angles.sin().to(dtype), torch.tensor([19, 0, 5, 12, 7])
    norms = None
    if norm != "none":
        shift = torch.randn(dim).to(dtype) if norm == "shift" else None
        norms = tuple(NormWeights(torch.randn(dim).to(dtype), 1e-6, shift) for _ in range(2))
    caches = [LayerCache(*torch.zeros(2, 5, 4, groups, dim).to(dtype)) for _ in range(2)]
    expected, got = (
        ops.rotate_and_store(q.clone(), k.clone(), v, norms, cos, sin, cache, slots)  # type: ignore[arg-type]
        for ops, cache in zip((TORCH, ops_of(kind, dtype)), caches, strict=True)
    )
    close(got, expected)
    close(caches[1].keys, caches[0].keys)
    assert caches[1].values.equal(caches[0].values)


@pytest.mark.parametrize(("kind", "dtype"), PRODUCTS)
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("query_lens", [(1, 1, 1), (1, 1, 23), (7, 2, 9)])
def test_attention(kind: str, dtype: torch.dtype, window: int | None, query_lens: tuple[int, ...]) -> None:
    batch = random_batch((12, 70, 33), query_lens, block_size=4)
    cache = LayerCache(*torch.randn(2, 128, 4, 2, 16).to(dtype))
    q = torch.randn(sum(query_lens), 8, 16).to(dtype)
    close(ops_of(kind, dtype).attention(q, cache, batch, window), TORCH.attention(q, cache, batch, window))


@pytest.mark.parametrize(("kind", "dtype"), ROWS)
def test_swiglu(kind: str, dtype: torch.dtype) -> None:
    gate, up = (3 * torch.randn(7, 2 * 110).to(dtype)).chunk(2, dim=1)
    close(ops_of(kind, dtype).swiglu(gate, up), TORCH.swiglu(gate, up))


@pytest.mark.parametrize(("kind", "dtype"), ROWS)
@pytest.mark.parametrize("normed", [False, True])
def test_route(kind: str, dtype: torch.dtype, normed: bool) -> None:
    logits = torch.randn(5, 12).to(dtype)
    (ids, weights), (expected, theirs) = (
        ops.route(logits, 3, normed) for ops in (ops_of(kind, dtype), TORCH)
    )
    assert ids.equal(expected) and weights.dtype == torch.float32
    close(weights.to(dtype), theirs.to(dtype))


@pytest.mark.parametrize(("kind", "dtype"), [*PRODUCTS, ("grouped_mm", torch.float32)])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("rows", [1, 9, 200])
def test_experts(kind: str, dtype: torch.dtype, int8: bool, rows: int) -> None:
    here, dim, columns, choices = 4, 48, 40, 3
    fc1, fc2 = (drawn(here, columns, dim, dtype=dtype) for _ in range(2))
    plain = ExpertWeights((fc1, fc2, drawn(here, dim, columns, dtype=dtype)), columns)
    x, routing = torch.randn(rows, dim).to(dtype), torch.rand(rows, choices)
    ids = torch.rand(rows, here).argsort(dim=1)[:, :choices]
    ids = ids.masked_fill(torch.rand(rows, choices) < 0.3, -1)  # these are elsewhere
    answers, counts = [], []
    for ops in (ops_of(kind, dtype), TORCH):
        counts.append(torch.full((1 + here,), 7))
        answers.append(ops.experts(x, ops.finalize_experts(plain, int8), ids, routing, counts[-1]))
    close(*answers)
    assert counts[0][1:].equal(counts[1][1:])


@pytest.mark.parametrize("kind", ["cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [50, 4100])
def test_draws(kind: str, dtype: torch.dtype, vocab_size: int) -> None:
    """Also of fp32 logits where activations are bf16, with many equal logits, in rows with others after them."""
    ops, count = ops_of(kind, torch.bfloat16), 40
    logits = torch.randn(count, vocab_size + 3).mul(8).round().div(2).to(dtype)[:, :vocab_size]
    assert ops.greedy(logits).equal(TORCH.greedy(logits))
    for draw, top_k, top_p in (
        ("draw_from_top_k", 7, 0.6),
        ("draw_from_top_p", 7, 0.6),
        ("draw_from_top_p", vocab_size, 0.9),
        ("draw_from_all", vocab_size, 1.0),
    ):
        columns = torch.tensor([[0.7], [top_k], [top_p], [0.0]], dtype=torch.float64).repeat(1, count)
        columns[3] = torch.rand(count, dtype=torch.float64)
        settings = DrawSettings(columns[:, :, None], [top_k] * count)
        got, expected = (getattr(each, draw)(logits, settings) for each in (ops, TORCH))
        assert got.equal(expected), draw


def test_a_gpu_without_kernels_computes_by_torch() -> None:
    ops = ops_of("nothing", torch.float32)
    plain = ExpertWeights((torch.zeros(2, 8, 16), torch.zeros(2, 8, 16), torch.zeros(2, 16, 8)), 8)
    assert not ops.experts_stay_on_device(plain)
    assert ops_of("triton", torch.float32).experts_stay_on_device(plain)
    assert ops_of("grouped_mm", torch.float32).experts_stay_on_device(plain)
    assert not ops_of("grouped_mm", torch.float32).experts_stay_on_device(
        ops.finalize_experts(plain, int8=True)
    )
