"""The parts of quantised weights that ranks read, at the real shapes: each has its own blocks' scales.

And the writer of the other tests against transformers' own, and each `Ops` against the weights that codes stand for.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from qwen3_dist.config import ModelConfig
from qwen3_dist.layout import Layout
from qwen3_dist.ops.base import ExpertWeights, LinearWeights, Matrix, Ops
from qwen3_dist.ops.quantize import dequantized, row_scales
from qwen3_dist.ops.torch_ops import TorchOps
from qwen3_dist.quantization import Grid
from qwen3_dist.weights.pieces import SCALE, Piece
from qwen3_dist.weights.weight_plan import WeightPlan
from tests.quantized import from_blocks, in_blocks
from tests.qwen3_dist.test_ops import PRODUCTS, close, ops_of

pytestmark = pytest.mark.usefixtures("two_threads")

OFFICIAL = Path(__file__).parents[2] / "cluster/planning/official.json"
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
SHAPES: dict[str, dict[str, Any]] = {
    "3 KV groups": {"model_type": "qwen3", "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 80,
                    "hidden_size": 480, "intermediate_size": 1000, "num_hidden_layers": 2},
    "odd": {"model_type": "qwen3_moe", "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 72,
            "hidden_size": 333, "moe_intermediate_size": 201, "intermediate_size": 999, "num_experts": 2,
            "num_experts_per_tok": 1, "num_hidden_layers": 2, "mlp_only_layers": [1]},
}  # fmt: skip


def config_of(shape: str) -> ModelConfig:
    official = json.loads(OFFICIAL.read_text())
    raw = SHAPES[shape] if shape in SHAPES else {**official[shape], "num_hidden_layers": 1}
    return ModelConfig.from_dict({**raw, "quantization_config": FP8})


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ("Qwen3-30B-A3B", "tp=4"),  # experts of 768 columns in 4 parts of 192
        ("Qwen3-30B-A3B", "tp=8"),  # in 8 of 96; replicated KV groups
        ("Qwen3-235B-A22B", "tp=8"),
        ("Qwen3-235B-A22B", "tp=16"),
        ("Qwen3-235B-A22B", "tp=2,dp=8,ep=2"),
        ("Qwen3-32B", "tp=16"),
        ("3 KV groups", "tp=3"),
        ("odd", "tp=8"),
    ],
)
@pytest.mark.parametrize("stacks", [False, True], ids=["experts", "fused"])
def test_parts_of_real_shapes_have_the_scales_of_their_own_blocks(
    shape: str, layout: str, stacks: bool
) -> None:
    config, parsed = config_of(shape), Layout.parse(layout)
    if stacks and not config.num_experts:
        return
    names = (
        {f"model.layers.{i}.mlp.experts.gate_up_proj" for i in range(config.n_layers)} if stacks else set()
    )
    plan, cut = WeightPlan(config, parsed, names), 0
    for rank in {0, 1, parsed.world // 2, parsed.world - 1}:
        pieces = plan.pieces(parsed.coords(rank))
        for piece in pieces:
            if piece.stored is not None:  # the weights of an expert stand for those of all
                scales = next(pieces)
                if stacks or ".experts." not in piece.source or ".experts.0." in piece.source:
                    cut += assert_scales_are_its_own(piece, scales)
    assert cut


def assert_scales_are_its_own(weight: Piece, scales: Piece) -> bool:
    """Scales that are the numbers of their blocks give each weight its block's number. Returns whether the part cuts
    a block."""
    assert scales.stored == SCALE and scales.grid == weight.grid and weight.grid is not None
    *_, rows, columns = weight.ranges
    numbers = torch.arange(scales.shape[-2] * scales.shape[-1], dtype=torch.float32).view(scales.shape[-2:])
    own = numbers[scales.index[-2:]]
    places = torch.tensor(columns) // 128
    expected = numbers[torch.tensor(rows) // 128]
    got = row_scales(own, weight.grid, range(len(rows)))
    of_columns = (weight.grid.first_column + torch.arange(len(columns))) // weight.grid.columns
    assert torch.equal(got[:, of_columns], expected[:, places])
    assert scales.target[-2:] == tuple(slice(0, size) for size in own.shape)
    return any(cut % 128 for cut in (rows.start, columns.start))


def test_the_tests_writer_and_transformers_own_write_the_same() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 48, 40) * torch.logspace(-3, 1, 40)
    settings = SimpleNamespace(
        quantization_config=SimpleNamespace(weight_block_size=[24, 20], scale_fmt="float")
    )
    theirs = Fp8Quantize(settings).convert({"experts.down_proj": weight})
    codes, scales = in_blocks(weight, 24, 20)
    assert torch.allclose(theirs["experts.down_proj_scale_inv"], scales, rtol=1e-6)
    assert (
        theirs["experts.down_proj"].float() - codes.float()
    ).abs().max() <= 32  # a step of the largest codes
    read = Fp8Dequantize(settings).convert(
        {"weight": theirs["experts.down_proj"], "weight_scale_inv": theirs["experts.down_proj_scale_inv"]}
    )["weight"]
    ours = from_blocks(theirs["experts.down_proj"], theirs["experts.down_proj_scale_inv"], 24, 20)
    assert torch.equal(read, ours)
    grid = Grid(24, 20)
    for expert in range(3):
        codes, scales = theirs["experts.down_proj"][expert], theirs["experts.down_proj_scale_inv"][expert]
        assert torch.equal(dequantized(codes, scales, grid, range(48), torch.float32), read[expert])


ALL_CODES = torch.arange(256, dtype=torch.uint8)
ALL_CODES[[0x7F, 0xFF]] = 0x7E  # not a number
GRIDS = [Grid(128, 128), Grid(128, 128, 64, 96), Grid(24, 20, 7, 13), Grid(1, 1 << 22), Grid(32, 32, 3, 6)]


def coded(*shape: int, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of all kinds, their scales, and the weights that they stand for, fp32."""
    *lead, outputs, inputs = shape
    numbers = ALL_CODES[torch.randint(0, 256, shape)]
    numbers.flatten()[: len(ALL_CODES)] = ALL_CODES
    codes = numbers.view(torch.float8_e4m3fn)
    scales = (torch.rand(*lead, *grid.shape(outputs, inputs)) + 0.1) / (100 * inputs**0.5)
    rows = (grid.first_row + torch.arange(outputs)) // grid.rows
    columns = (grid.first_column + torch.arange(inputs)) // grid.columns
    return codes, scales, codes.float() * scales[..., rows, :][..., columns]


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def each_ops(kind: str, dtype: torch.dtype) -> list[Ops]:
    return [TorchOps(), ops_of(kind, dtype)]


@pytest.mark.parametrize(("kind", "dtype"), PRODUCTS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("rows", [0, 1, 5, 30, 80])
def test_products_with_codes_are_those_with_the_weights(
    kind: str, dtype: torch.dtype, grid: Grid, rows: int
) -> None:
    x, parts, expected = torch.randn(rows, 150).to(dtype), [], []
    for outputs in (70, 33, 40):
        codes, scales, weight = coded(outputs, 150, grid=grid)
        bias = torch.randn(outputs).to(dtype) if outputs == 33 else None
        parts.append(Matrix(codes, outputs, scales, bias, grid))
        expected += TorchOps().linear(x, LinearWeights((Matrix(weight.to(dtype), outputs, bias=bias),)))
    plain = LinearWeights(tuple(parts))
    for ops in each_ops(kind, dtype):
        for weights in (plain, ops.finalize_linear(plain, False)):
            for got, each in zip(ops.linear(x, weights), expected, strict=True):
                close(got, each)


@pytest.mark.parametrize(("kind", "dtype"), PRODUCTS)
@pytest.mark.parametrize("rows", [0, 1, 9, 120])
def test_experts_of_codes_are_those_of_the_weights(kind: str, dtype: torch.dtype, rows: int) -> None:
    wide, tall = Grid(24, 20, 7, 0), Grid(24, 20, 0, 7)
    made = [coded(4, *sizes, grid=grid) for *sizes, grid in ((45, 66, wide), (45, 66, wide), (66, 45, tall))]
    codes, scales, weights = (tuple(each) for each in zip(*made, strict=True))
    stacks = ExpertWeights(codes, 45, scales, (wide, wide, tall))  # type: ignore[arg-type]
    plain = ExpertWeights(tuple(each.to(dtype) for each in weights), 45)  # type: ignore[arg-type]
    x, ids = torch.randn(rows, 66).to(dtype), torch.randint(-1, 4, (rows, 2))
    routing, counts = torch.rand(rows, 2), torch.zeros(5, dtype=torch.int64)
    expected = TorchOps().experts(x, plain, ids, routing, counts.clone())
    for ops in each_ops(kind, dtype):
        for kept in (stacks, ops.finalize_experts(stacks, False)):
            close(ops.experts(x, kept, ids, routing, counts.clone()), expected)
