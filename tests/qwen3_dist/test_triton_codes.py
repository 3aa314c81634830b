"""GPU products with the codes of quantised checkpoints against plain torch, by Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qwen3_dist.ops.base import ExpertWeights, LinearWeights, Matrix
from qwen3_dist.ops.cuda import triton_codes
from qwen3_dist.ops.cuda.attention import PLAIN, Chosen
from qwen3_dist.ops.cuda.deterministic import DeterministicCudaOps
from qwen3_dist.ops.cuda.kernels import GpuKernels
from qwen3_dist.ops.cuda.ops import CudaOps, JoinedLinear
from qwen3_dist.ops.torch_ops import TorchOps
from qwen3_dist.quantization import ALL_INPUTS, FP4, FP8, Grid
from tests.qwen3_dist.test_products_with_codes import KINDS, Kind, coded

TORCH = TorchOps()
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def gpu_ops(dtype: torch.dtype, deterministic: bool = False) -> CudaOps:
    kernels = dict.fromkeys((dtype, torch.float32), GpuKernels())
    if deterministic:
        return DeterministicCudaOps(CPU, dtype, kernels)
    return CudaOps(CPU, dtype, kernels, Chosen(PLAIN, ()), grouped_mm=False)


def fp8(grid: Grid, *shape: int) -> Matrix:
    """Codes of all values but the two that are no numbers, and scales of the blocks of `grid`."""
    *lead, outputs, inputs = shape
    bits = torch.randint(0, 127, shape) + 128 * torch.randint(0, 2, shape)
    scale = (torch.rand(*lead, *grid.shape(outputs, inputs)) + 0.1) / (100 * inputs**0.5)
    return Matrix(bits.to(torch.uint8).view(torch.float8_e4m3fn), outputs, scale, None, grid)


def close(got: Tensor, expected: Tensor) -> None:
    error = 2e-5 if got.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(got, expected, atol=error, rtol=error)


CUT = Grid(24, 20, 7, 13)
GRIDS = [
    Grid(128, 128),
    Grid(128, 128, 64, 64),  # the second shard of 192 of Qwen3-30B-A3B's experts, at etp=4
    Grid(128, 128, 0, 96),  # the second of 96, at etp=8
    CUT,
    Grid(1, ALL_INPUTS),  # a scale for each output
]


@pytest.mark.parametrize("native", [False, True], ids=["by-bits", "by-card"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("rows", "dtype"), [(0, torch.float32), (3, torch.float16), (70, torch.float32)])
def test_a_product_with_fp8(
    rows: int, dtype: torch.dtype, grid: Grid, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_codes, "has_fp8", lambda _: native)
    part, x = fp8(grid, 70, 203), torch.randn(rows, 203).to(dtype)
    close(triton_codes.linear_codes(x, part), TORCH._product(x, part))


@pytest.mark.parametrize("native", [False, True], ids=["by-bits", "by-card"])
def test_every_code_of_fp8_is_its_value(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_codes, "has_fp8", lambda _: native)
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None]
    part = Matrix(codes, 256, torch.ones(1, 1), None, Grid(256, 128))
    got = triton_codes.linear_codes(torch.ones(1, 1), part)[0]
    wide = codes[:, 0].float()
    numbers = ~wide.isnan() | (not native)  # the interpreter of a card's conversion knows no NaN
    torch.testing.assert_close(got[numbers], wide[numbers], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "inputs"), [(1, 151), (70, 64)])
def test_a_product_with_integers_and_fp4(rows: int, inputs: int, kind: Kind) -> None:
    part, weight = coded(kind, 40, inputs)
    x = torch.randn(rows, inputs)
    close(triton_codes.linear_codes(x, part), x @ weight.t())


def test_many_rows_take_large_tiles() -> None:
    part, x = fp8(CUT, 140, 70), torch.randn(300, 70)
    assert triton_codes._tile(300, 1, 140, False).rows == 128
    close(triton_codes.linear_codes(x, part), TORCH._product(x, part))


def experts_of(parts: list[Matrix]) -> ExpertWeights:
    triples = [
        None if getattr(parts[0], name) is None else tuple(getattr(part, name) for part in parts)
        for name in ("weight", "scale", "grid", "zero", "order")
    ]
    codes, scales, grids, zeros, orders = triples
    return ExpertWeights(codes, parts[0].outputs, scales, grids, zeros, orders)  # type: ignore[arg-type]


WAYS = ["fp8", "fp8, cut", *(KINDS[i] for i in (1, 3, 6, 8))]


def stacks(way: Kind | str, experts: int, dim: int, columns: int) -> ExpertWeights:
    sizes = ((columns, dim), (columns, dim), (dim, columns))
    if isinstance(way, Kind):
        parts = [coded(way, experts, *size)[0] for size in sizes]
    else:
        parts = [fp8(CUT if "cut" in way else GRIDS[0], experts, *size) for size in sizes]
    return experts_of([part._replace(outputs=size[0]) for part, size in zip(parts, sizes, strict=True)])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("rows", [0, 2, 60])
def test_experts(rows: int, deterministic: bool, way: Kind | str) -> None:
    """Also with choices that are elsewhere."""
    x, weights = torch.randn(rows, 66), stacks(way, 3, 66, 45)
    ids, routing = torch.randint(-1, 3, (rows, 2)), torch.rand(rows, 2)
    ops, counts = gpu_ops(torch.float32, deterministic), torch.zeros(2, 4).long()
    weights = ops.finalize_experts(weights, False)
    assert ops.experts_stay_on_device(weights)
    if deterministic:
        ids, routing = ids[:, 0].contiguous(), routing[:, 0].contiguous()
        hidden = ops.expert_hidden(x, weights, ids, counts[0])
        expected = TORCH.expert_hidden(x, weights, ids, counts[1])
        close(hidden[ids >= 0], expected[ids >= 0])
        got = ops.expert_outputs(expected, weights, ids, routing, 66)
        close(got, TORCH.expert_outputs(expected, weights, ids, routing, 66))
    else:
        close(
            ops.experts(x, weights, ids, routing, counts[0]),
            TORCH.experts(x, weights, ids, routing, counts[1]),
        )
    assert counts[0].equal(counts[1]) and counts[0].sum() == ids.numel()


@pytest.mark.parametrize("way", ["fp8", KINDS[1]])
def test_layers_with_one_input_are_one_product(way: Kind | str) -> None:
    """Whose parts keep no memory of their own, and equal the same layers by themselves."""
    grid = Grid(16, 20)
    sizes = (64, 32, 16)
    parts = tuple(coded(way, n, 72)[0] if isinstance(way, Kind) else fp8(grid, n, 72) for n in sizes)
    weights, ops, x = LinearWeights(parts), gpu_ops(torch.float32), torch.randn(5, 72)
    joined = ops.finalize_linear(weights, False)
    assert isinstance(joined, JoinedLinear)
    for name in ("weight", "scale", "zero"):
        of_all, of_first = getattr(joined.joined, name), getattr(joined.parts[0], name)
        assert of_all is None or of_all.untyped_storage().data_ptr() == of_first.untyped_storage().data_ptr()
    for got, expected in zip(ops.linear(x, joined), TORCH.linear(x, weights), strict=True):
        close(got, expected)


def test_layers_whose_blocks_are_cut_where_they_meet_are_products_of_their_own() -> None:
    ops, x = gpu_ops(torch.float32), torch.randn(5, 72)
    one, two, bias = fp8(Grid(16, 20), 40, 72), fp8(Grid(16, 20), 32, 72), torch.randn(32)
    for parts in ((one, two), (one, fp8(Grid(16, 20, 8), 32, 72)), (two, two._replace(bias=bias))):
        weights = LinearWeights(parts)
        kept = ops.finalize_linear(weights, False)
        assert not isinstance(kept, JoinedLinear)
        for got, expected in zip(ops.linear(x, kept), TORCH.linear(x, weights), strict=True):
            close(got, expected)


def test_the_deterministic_product_of_a_row_is_the_same_bits_beside_others() -> None:
    ops, part = gpu_ops(torch.float32, deterministic=True), fp8(CUT, 70, 203)
    x = torch.randn(300, 203)
    many, one = ops.linear(x, LinearWeights((part,)))[0], ops.linear(x[7:8], LinearWeights((part,)))[0]
    close(many, TORCH._product(x, part))
    assert many[7:8].equal(one)


def test_codes_whose_kernels_do_not_work_are_computed_by_torch() -> None:
    """Experts of which fc1 and fc2 have other blocks are, too."""
    x, ids, routing = torch.randn(4, 66), torch.randint(0, 3, (4, 2)), torch.rand(4, 2)
    weights, part = stacks("fp8", 3, 66, 45), fp8(CUT, 70, 66)
    assert weights.grids is not None
    for deterministic in (False, True):
        ops = gpu_ops(torch.float32, deterministic)
        assert ops._kernels is not None
        ops._kernels.reads_codes = lambda kind: False
        assert not ops.experts_stay_on_device(weights)
        close(ops._product(x, part), TORCH._product(x, part))
        got, expected = (
            each.experts(x, weights, ids, routing, torch.zeros(4).long()) for each in (ops, TORCH)
        )
        close(got, expected)
    fc1, fc2, fc3 = weights.grids
    assert not gpu_ops(torch.float32).experts_stay_on_device(
        replace(weights, grids=(fc1, fc2._replace(first_row=8), fc3))
    )


@pytest.mark.parametrize("deterministic", [False, True])
def test_kernels_for_codes_are_tried_when_weights_are_finalized(deterministic: bool) -> None:
    """And not in the first step, which must not wait for a card."""
    ops = gpu_ops(torch.float32, deterministic)
    tried: list[str] = []
    assert ops._kernels is not None
    ops._kernels.reads_codes = lambda kind: not tried.append(kind)  # type: ignore[func-returns-value]
    ops.finalize_linear(LinearWeights((fp8(CUT, 8, 16),)), False)
    assert tried == [FP8]
    ops.finalize_experts(stacks(KINDS[8], 2, 16, 8), False)
    assert tried == [FP8, FP4, FP4, FP4]
