"""Products with codes of 4 bits, and with others that have groups, are those with the weights that codes stand for."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from qwen3_dist.ops.base import ExpertWeights, LinearWeights, Matrix, Ops
from qwen3_dist.ops.choose import deterministic_ops
from qwen3_dist.ops.quantize import dequantized, packed, unpacked
from qwen3_dist.ops.torch_ops import TorchOps
from qwen3_dist.quantization import ALL_INPUTS, FP4, INT4, INT8, Grid
from tests.qwen3_dist.test_ops import PRODUCTS, close, ops_of

pytestmark = pytest.mark.usefixtures("two_threads")

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


class Kind(NamedTuple):
    codes: str
    columns: int  # of a group
    first: int = 0  # inputs of the first group that lie before the part
    zeros: bool = False
    ordered: bool = False


KINDS = [
    Kind(INT4, 32, 6),
    Kind(INT4, 128, 96, zeros=True),
    Kind(INT4, 20, 13, zeros=True),  # an odd cut: words lie in two groups
    Kind(INT4, 32, 0, zeros=True, ordered=True),
    Kind(INT4, ALL_INPUTS),
    Kind(INT8, 32, 4, zeros=True),
    Kind(INT8, 10, 3),
    Kind(INT8, 16, 0, ordered=True),
    Kind(FP4, 16, 8),
    Kind(FP4, 32, 31),
]


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def coded(kind: Kind, *shape: int) -> tuple[Matrix, Tensor]:
    """Codes of all values, what belongs to them, and the weights that they stand for by the formats' formulas."""
    *lead, outputs, inputs = shape
    numbers = torch.randint(0, 256 if kind.codes == INT8 else 16, shape)
    groups = 7 if kind.ordered else -(-(kind.first + inputs) // kind.columns)
    scale = (torch.rand(*lead, outputs, groups) + 0.1) / ((100 if kind.codes == INT8 else 6) * inputs**0.5)
    zero = torch.randint(0, 256 if kind.codes == INT8 else 16, scale.shape) if kind.zeros else None
    of_input = (torch.arange(inputs) + kind.first) // kind.columns
    order = None
    if kind.ordered:
        order = torch.randint(0, groups, (*lead, inputs)).int()
    index = (order.long() if order is not None else of_input)[..., None, :].expand(shape)
    if kind.codes == FP4:
        values = E2M1[numbers % 8] * torch.where(numbers >= 8, -1, 1)
    else:
        middle = 128 if kind.codes == INT8 else 8
        values = (numbers - (zero.gather(-1, index) if zero is not None else middle)).float()
    weight = values * scale.gather(-1, index)
    nibbles = None if kind.codes == INT8 else kind.codes
    codes = (numbers - 128).to(torch.int8) if kind.codes == INT8 else packed(numbers.to(torch.uint8))
    if zero is not None:
        zero = (zero - (128 if kind.codes == INT8 else 0)).to(torch.int8)
    grid = Grid(1, kind.columns, 0, 0 if kind.ordered else kind.first, nibbles, groups if kind.ordered else 0)
    return Matrix(codes, outputs, scale, None, grid, zero, order), weight


def each_ops(kind: str, dtype: torch.dtype) -> list[Ops]:
    return [
        TorchOps(),
        ops_of(kind, dtype),
        *([deterministic_ops(torch.device("cpu"), dtype)] if kind == "cpu" else []),
    ]


def test_numbers_of_4_bits_are_two_in_a_byte() -> None:
    numbers = torch.randint(0, 16, (3, 7)).to(torch.uint8)
    assert packed(numbers)[0, 0] == numbers[0, 0] + 16 * numbers[0, 1]
    assert torch.equal(unpacked(packed(numbers))[:, :7], numbers)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_formula(kind: Kind) -> None:
    part, weight = coded(kind, 9, 151)
    assert part.scale is not None and part.grid is not None
    more = (part.zero, part.order)
    got = dequantized(part.weight, part.scale, part.grid, range(2, 9), torch.float32, *more)
    torch.testing.assert_close(got[:, :151], weight[2:], rtol=0, atol=0)


# Triton's interpreter takes seconds for a product; `test_triton_codes` has more of them.
@pytest.mark.parametrize(
    ("ops", "dtype", "rows"),
    [(*each, rows) for each in PRODUCTS for rows in ((1, 80) if each[0] == "triton" else (0, 1, 5, 30, 80))],
)
@pytest.mark.parametrize("kind", KINDS)
def test_products_with_codes_are_those_with_the_weights(
    ops: str, dtype: torch.dtype, kind: Kind, rows: int
) -> None:
    x, parts, expected = torch.randn(rows, 151).to(dtype), [], []
    for outputs in (70, 33, 40):
        part, weight = coded(kind, outputs, 151)
        bias = torch.randn(outputs).to(dtype) if outputs == 33 else None
        parts.append(part._replace(bias=bias))
        expected += TorchOps().linear(x, LinearWeights((Matrix(weight.to(dtype), outputs, bias=bias),)))
    plain = LinearWeights(tuple(parts))
    for each in each_ops(ops, dtype):
        for weights in (plain, each.finalize_linear(plain, False)):
            for got, wanted in zip(each.linear(x, weights), expected, strict=True):
                close(got, wanted)


@pytest.mark.parametrize(
    ("ops", "dtype", "rows"),
    [(*each, rows) for each in PRODUCTS for rows in ((0, 9) if each[0] == "triton" else (0, 1, 9, 120))],
)
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2], KINDS[3], KINDS[5], KINDS[8]])
def test_experts_of_codes_are_those_of_the_weights(
    ops: str, dtype: torch.dtype, kind: Kind, rows: int
) -> None:
    made = [coded(kind, 4, *sizes) for sizes in ((45, 66), (45, 66), (66, 45))]
    triples = [
        tuple(getattr(part, name) for part, _ in made)
        for name in ("weight", "scale", "grid", "zero", "order")
    ]
    codes, scales, grids, zeros, orders = (None if each[0] is None else each for each in triples)
    stacks = ExpertWeights(codes, 45, scales, grids, zeros, orders)  # type: ignore[arg-type]
    plain = ExpertWeights(tuple(weight.to(dtype) for _, weight in made), 45)  # type: ignore[arg-type]
    x, ids = torch.randn(rows, 66).to(dtype), torch.randint(-1, 4, (rows, 2))
    routing, counts = torch.rand(rows, 2), torch.zeros(5, dtype=torch.int64)
    expected = TorchOps().experts(x, plain, ids, routing, counts.clone())
    for each in each_ops(ops, dtype):
        for kept in (stacks, each.finalize_experts(stacks, False)):
            close(each.experts(x, kept, ids, routing, counts.clone()), expected)
