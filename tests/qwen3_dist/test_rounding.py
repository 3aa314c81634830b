"""`quantize` of fp8 and int4: weights that are rounded while they load are the same in every layout."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen3_dist import LLM
from qwen3_dist.config import ModelConfig
from qwen3_dist.layout import Layout
from qwen3_dist.ops.quantize import as_fp8, as_int4, unpacked
from qwen3_dist.quantization import ROUNDS_TO
from qwen3_dist.weights import rounding
from qwen3_dist.weights.files import CheckpointFiles
from qwen3_dist.weights.pieces import SCALE, Piece
from qwen3_dist.weights.rounding import read_rounded
from qwen3_dist.weights.weight_plan import WeightPlan
from tests.checkpoints import write_checkpoint
from tests.quantized import from_blocks, fused, in_blocks, is_linear
from tests.qwen3_dist.test_quantized import GREEDY, PROMPTS, assert_equal, engine

FORMATS = ("fp8", "int4")
# Blocks of 128 lie across heads, experts' columns and the halves of fused gates and ups.
ODD: dict[str, Any] = {
    "hidden_size": 200, "head_dim": 48, "num_hidden_layers": 2, "intermediate_size": 300,
    "moe_intermediate_size": 170, "num_experts": 6, "mlp_only_layers": [1],
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain"), moe=True, **ODD)


@pytest.fixture(scope="module")
def stacked(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tensors(plain, tmp_path_factory.mktemp("stacked"), fused(tensors_of(plain)))


@pytest.fixture(scope="module")
def rounded(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each format the checkpoint of the weights that the codes stand for."""
    made = {}
    for kind in FORMATS:
        tensors = {
            name: values(kind, *codes_of(kind, tensor)) if is_linear(name) else tensor
            for name, tensor in tensors_of(plain).items()
        }
        made[kind] = with_tensors(plain, tmp_path_factory.mktemp(kind), tensors)
    return made


def codes_of(kind: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The codes and scales of a whole matrix, of fp8 by the tests' own writer."""
    return in_blocks(weight, 128, 128) if kind == "fp8" else as_int4(weight)


def values(kind: str, codes: Tensor, scales: Tensor) -> Tensor:
    """What codes of whole matrices stand for."""
    if kind == "fp8":
        return from_blocks(codes, scales, 128, 128)
    return from_blocks(codes.float() - 8, scales, 1, 128)


def tensors_of(path: Path) -> dict[str, Tensor]:
    return load_file(path / "model.safetensors")


def with_tensors(original: Path, path: Path, tensors: dict[str, Tensor]) -> Path:
    shutil.copytree(original, path, dirs_exist_ok=True)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path / "model.safetensors", {"format": "pt"})
    return path


def test_rounded_weights_are_within_half_a_step_and_blocks_of_zeros_stay_zeros() -> None:
    torch.manual_seed(0)
    weight = torch.randn(300, 200) * torch.logspace(-6, 3, 300)[:, None]
    weight[:128, :128] = 0
    codes, scales = as_fp8(weight, 128, 128)
    assert scales.shape == (3, 2) and scales[0, 0] == 1
    back = from_blocks(codes, scales, 128, 128)
    steps = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:300, :200] * 2.0**-9
    assert ((back - weight).abs() <= torch.maximum(weight.abs() / 16, steps / 2) * 1.0001).all()
    assert not back[:128, :128].any()


def test_each_group_of_int4_has_the_best_of_the_scales_that_are_tried() -> None:
    torch.manual_seed(0)
    weight = torch.randn(300, 200) * torch.logspace(-6, 3, 300)[:, None]
    weight[:3, :128] = 0
    numbers, scales = as_int4(weight)
    assert scales.shape == (300, 2) and torch.equal(scales, scales.bfloat16().float())
    steps = scales.repeat_interleave(128, 1)[:, :200]
    assert torch.equal(numbers, ((weight / steps).round().clamp(-8, 7) + 8).to(torch.uint8))
    back = values("int4", numbers, scales)
    assert not back[:3, :128].any()
    by_groups = {name: F.pad(each, (0, 56)).view(300, 2, 128) for name, each in (("w", weight), ("b", back))}
    error = (by_groups["w"] - by_groups["b"]).square().sum(-1)
    most = by_groups["w"].abs().amax(-1).clamp(min=1e-30)
    minmax = (most / 7.5)[..., None]
    usual = (by_groups["w"] / minmax).round().clamp(-8, 7) * minmax
    assert (error <= (by_groups["w"] - usual).square().sum(-1) * 1.03 + 1e-30).all()  # bf16 of the scale
    assert (scales <= most / 7.4).all() and (scales >= most / 9.1).all()
    assert error.sum().sqrt() < 0.11 * weight.square().sum().sqrt()


def test_a_group_with_a_weight_that_is_no_number_gives_none() -> None:
    weight = torch.ones(2, 256)
    weight[0, 3] = torch.nan
    numbers, scales = as_int4(weight)
    assert scales[0, 0].isnan() and scales.isnan().sum() == 1 and (numbers[1] == 15).all()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("layout", ["tp=1", "tp=2", "tp=8", "tp=2,dp=2,ep=2,pp=2"])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("stacks", [False, True], ids=["experts", "fused"])
def test_each_rank_has_its_part_of_the_whole_matrix_codes(
    plain: Path,
    stacked: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    layout: str,
    deterministic: bool,
    stacks: bool,
) -> None:
    monkeypatch.setattr(rounding, "TILE", 128 * 200)  # a row of blocks, or some groups, at a time
    files = CheckpointFiles(stacked if stacks else plain)
    whole = {name: codes_of(kind, tensor) for name, tensor in tensors_of(plain).items() if is_linear(name)}
    config = replace(ModelConfig.from_directory(plain), quantization=ROUNDS_TO[kind])
    parsed = Layout.parse(layout)
    plan = WeightPlan(config, parsed, files.names(), deterministic=deterministic)
    compared = 0
    for rank in range(parsed.world):
        for piece in plan.pieces(parsed.coords(rank)):
            if piece.rounds is None or piece.stored == SCALE:
                continue
            compared += 1
            assert piece.grid is not None
            *lead, rows, columns = piece.ranges
            count = (len(lead[0]),) if lead else ()
            width = -(-len(columns) // 2) if kind == "int4" else len(columns)
            dtype = torch.uint8 if kind == "int4" else torch.float8_e4m3fn
            codes = torch.zeros(*count, len(rows), width, dtype=dtype)
            scales = torch.zeros(*count, *piece.grid.shape(len(rows), len(columns)))
            at = (slice(0, len(codes)),) if lead else (slice(None),)
            read_rounded(files, replace(piece, target=at), codes, scales)
            for place, (name, first) in enumerate(_matrices(piece)):
                own_rows = range(rows.start - first, rows.stop - first)
                theirs, blocks = whole[name]
                mine = codes[place] if lead else codes
                mine = unpacked(mine)[:, : len(columns)] if kind == "int4" else mine
                assert torch.equal(_part(theirs, own_rows, columns).float(), mine.float())
                own_blocks = (scales[place] if lead else scales).flatten()
                tall, wide = piece.grid.shape(len(rows), len(columns))
                top, left = own_rows.start // piece.grid.rows, columns.start // 128
                assert torch.equal(blocks[top : top + tall, left : left + wide].flatten(), own_blocks)
    assert compared > 10


def _part(tensor: Tensor, rows: range, columns: range) -> Tensor:
    return tensor[rows.start : rows.stop, columns.start : columns.stop]


def _matrices(piece: Piece) -> list[tuple[str, int]]:
    """The names of the matrices of single experts that a piece is of, and the source's row where each begins."""
    if not piece.source.endswith(("gate_up_proj", "experts.down_proj")):
        return [(piece.source, 0)]
    base, _, fused_name = piece.source.rpartition(".")
    assert piece.rounds is not None
    half = "up_proj" if piece.rounds.start else "gate_proj"
    name = half if fused_name == "gate_up_proj" else "down_proj"
    return [(f"{base}.{expert}.{name}.weight", piece.rounds.start) for expert in piece.ranges[0]]


@pytest.mark.usefixtures("nursery")
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("layout", ["tp=1", "tp=4", "tp=2,dp=2,ep=2"])
def test_every_layout_computes_with_the_rounded_weights(
    plain: Path, rounded: dict[str, Path], kind: str, layout: str
) -> None:
    with engine(plain, layout, quantize=kind) as llm:
        assert_equal(llm.generate(PROMPTS, GREEDY, use_tqdm=False), rounded[kind])


@pytest.mark.usefixtures("nursery")
@pytest.mark.parametrize("kind", FORMATS)
def test_moved_experts_are_rounded_as_at_loading(stacked: Path, rounded: dict[str, Path], kind: str) -> None:
    with engine(stacked, "tp=2,ep=2", quantize=kind, redundant_experts=2) as llm:
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert llm.rebalance_experts(), "no layer was worth moving, so nothing was tested"
        assert_equal(llm.generate(PROMPTS, GREEDY, use_tqdm=False), rounded[kind])


@pytest.mark.usefixtures("nursery")
@pytest.mark.parametrize("kind", FORMATS)
def test_deterministic_layouts_give_the_same_bits(plain: Path, kind: str) -> None:
    def answer(llm: LLM) -> list[Any]:
        return [(each.token_ids, each.logprobs) for each in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]

    answers = []
    for layout in ("tp=1", "tp=2,ep=2"):
        settings = {"deterministic": True, "dtype": "bfloat16", "max_num_batched_tokens": 40}
        with engine(plain, layout, quantize=kind, **settings) as llm:
            answers.append(answer(llm))
    assert answers[0] == answers[1]
