"""Grouped products against the loop over experts, and int8 weights against what they stand for."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.errors import ConfigError
from qwen3_dist.model.experts import Experts, ExpertShape
from qwen3_dist.ops import slices
from qwen3_dist.ops.base import ExpertWeights
from qwen3_dist.ops.choose import choose_ops
from qwen3_dist.ops.cuda.attention import PLAIN, Chosen
from qwen3_dist.ops.cuda.experts import grouped_experts
from qwen3_dist.ops.cuda.kernels import GpuKernels
from qwen3_dist.ops.cuda.ops import CudaOps
from qwen3_dist.ops.quantize import as_int8
from qwen3_dist.ops.torch_experts import counted
from qwen3_dist.ops.torch_ops import TorchOps
from qwen3_dist.parallel.dispatch import DispatchedTokens
from qwen3_dist.settings import EngineConfig
from tests.checkpoints import write_checkpoint

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("here", [1.0, 0.3, 0.0])
def test_grouped_experts_equal_the_loop(rows: int, here: float) -> None:
    """`here` is the share of choices whose expert is on this rank."""
    torch.manual_seed(0)
    experts, dim, columns, choices = 5, 32, 24, 3
    x, weights = torch.randn(rows, dim), torch.rand(rows, choices)
    stacks = (
        torch.randn(experts, columns, dim) / 6,
        torch.randn(experts, columns, dim) / 6,
        torch.randn(experts, dim, columns) / 5,
    )
    ids = torch.randint(0, experts - 1, (rows, choices))  # the last expert is never chosen
    ids[torch.rand(rows, choices) >= here] = -1
    kept = ExpertWeights(stacks, columns)
    expected = TorchOps().experts(x, kept, ids, weights, torch.zeros(1 + experts, dtype=torch.int64))
    got = grouped_experts(x, kept, ids, weights, counted(ids, experts), None)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", ["looped", "grouped", "triton"])
def test_slices_of_a_large_batch_give_the_same_sums(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    kernels = {torch.float32: GpuKernels() if way == "triton" else None}
    of_gpu = CudaOps(torch.device("cpu"), torch.float32, kernels, Chosen(PLAIN, ()), way == "grouped")
    ops = TorchOps() if way == "looped" else of_gpu
    layer = Experts(5, ExpertShape.of_columns(32, 24), ops).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.normal_(0, 0.2)
    ids = torch.randint(-1, 5, (11, 3))
    ids[4:8] = torch.tensor([0, 1, 2])  # a whole slice wants the experts of this rank
    received = DispatchedTokens(torch.randn(11, 32), ids, torch.rand(11, 3))
    whole = layer(received)
    counted_once = layer.counts.clone()
    monkeypatch.setattr(slices, "SLICE_PAIRS", 12)
    rows: list[int] = []
    sums = ops._experts_of_slice
    monkeypatch.setattr(ops, "_experts_of_slice", lambda x, *more: (rows.append(len(x)), sums(x, *more))[1])
    torch.testing.assert_close(layer(received), whole, atol=1e-5, rtol=1e-5)
    assert rows == [4, 4, 3]
    assert torch.equal(layer.counts, 2 * counted_once)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("places", [[], [2], [0, 3]])
def test_packed_experts_are_replaced_in_their_places_alone(places: list[int], quantized: bool) -> None:
    torch.manual_seed(0)
    shapes = ((24, 32), (24, 32), (32, 24))
    ops = choose_ops(torch.device("cpu"), torch.float32)

    def packed(stacks: tuple[torch.Tensor, ...]) -> Experts:
        experts = Experts(4, ExpertShape.of_columns(32, 24), ops).requires_grad_(False)
        for parameter, stack in zip(experts.parameters(), stacks, strict=True):
            parameter.copy_(stack)
        experts.finalize(int8=quantized)
        return experts

    old = tuple(torch.randn(4, *shape) for shape in shapes)
    new = tuple(torch.randn(len(places), *shape) for shape in shapes)
    experts = packed(old)
    experts.counts.copy_(torch.arange(4))
    experts.replace(torch.tensor(places, dtype=torch.int64), experts.convert((new[0], new[1], new[2])))
    assert experts.counts.tolist() == [0 if place in places else place for place in range(4)]
    mixed = tuple(stack.clone() for stack in old)
    for stack, arrived in zip(mixed, new, strict=True):
        stack[places] = arrived
    expected = packed(mixed)
    for mine, theirs in zip(experts.weights.tensors, expected.weights.tensors, strict=True):
        assert torch.equal(mine, theirs)


def test_int8_weights_are_within_half_a_step_of_what_they_stand_for() -> None:
    weight = torch.randn(5000, 33) * torch.logspace(-6, 3, 5000)[:, None]
    weight[7] = 0
    quantized, scale = as_int8(weight)
    assert quantized.dtype == torch.int8 and scale.shape == (5000,)
    assert ((quantized * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()


def first_logprobs(path: Path, quantize: str, layout: str) -> dict[int, float]:
    """Of the likeliest tokens after a prompt."""
    form: dict[str, Any] = {"executor": "in_process" if layout == "tp=1" else "processes", "use_tqdm": False}
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=20)
    with LLM(str(path), layout=layout, quantize=quantize, **form) as llm:
        output = llm.generate([list(range(3, 40))], params, use_tqdm=False)[0]
    assert output.logprobs is not None
    return dict(output.logprobs[0].top)


def round_to_int8(path: Path) -> None:
    """Replaces every matrix but the router's and the embedding's by what int8 makes of it; a head tied to the
    embedding becomes one of its own."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    for name, tensor in tensors.items():
        if tensor.ndim > 1 and not name.endswith(("mlp.gate.weight", "embed_tokens.weight")):
            quantized, scale = as_int8(tensor)
            tensors[name] = quantized * scale[..., None]
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))


@pytest.mark.parametrize(("moe", "tied"), [(False, False), (True, False), (False, True)])
def test_a_model_with_int8_weights_is_the_model_of_the_rounded_weights(
    tmp_path: Path, moe: bool, tied: bool
) -> None:
    path = write_checkpoint(tmp_path, moe=moe, tie_word_embeddings=tied)
    got = first_logprobs(path, "int8", "tp=1")
    round_to_int8(path)
    assert got == pytest.approx(first_logprobs(path, "none", "tp=1"), abs=1e-3)


@pytest.mark.usefixtures("nursery")
@pytest.mark.parametrize(("moe", "layout"), [(False, "tp=2"), (True, "tp=2"), (True, "tp=2,ep=2")])
def test_a_sharded_model_rounds_its_own_part_and_stays_close(tmp_path: Path, moe: bool, layout: str) -> None:
    path = write_checkpoint(tmp_path, moe=moe)
    full, sharded = first_logprobs(path, "none", layout), first_logprobs(path, "int8", layout)
    common = full.keys() & sharded.keys()
    assert len(common) >= 15
    assert statistics.mean(abs(full[token] - sharded[token]) for token in common) < 0.3


def test_an_unknown_quantization_is_refused() -> None:
    with pytest.raises(ConfigError, match="quantize must be one of none, int8, fp8, int4, not 'int2'"):
        EngineConfig(quantize="int2")
