"""The kernels of GPU ranks against the plain layers, run by Triton's interpreter, so that no GPU is needed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_dist.ops.base import ExpertWeights, NormWeights
from qwen3_dist.ops.batch import LayerCache
from qwen3_dist.ops.cuda import triton_products, triton_rows
from qwen3_dist.ops.cuda.attention import PLAIN, Chosen
from qwen3_dist.ops.cuda.kernels import GpuKernels
from qwen3_dist.ops.cuda.ops import CudaOps
from qwen3_dist.ops.quantize import as_int8
from qwen3_dist.ops.torch_experts import counted
from qwen3_dist.ops.torch_ops import TorchOps, apply_rope
from qwen3_dist.protocol.step_plan import SampleSpec
from qwen3_dist.worker.sampling import sampler

DTYPES = [torch.float32, torch.bfloat16]
OF_PRODUCTS = [torch.float32, torch.float16]  # the interpreter multiplies the bits of bf16
TORCH = TorchOps()


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def close(got: Tensor, expected: Tensor) -> None:
    """Equal up to the last bits; the interpreter cuts bf16 off where a card rounds, once a step."""
    error = 1e-5 if got.dtype == torch.float32 else 2**-5
    torch.testing.assert_close(got, expected, atol=error, rtol=error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 96), (3, 2, 1024), (0, 64)])
def test_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, scale = 3 * torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    close(triton_rows.norm(x, scale, 1e-6), TORCH.norm(x, NormWeights(scale, 1e-6)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("heads", "groups", "dim"), [(4, 2, 16), (6, 1, 24)])
def test_rotate(heads: int, groups: int, dim: int, normed: bool, dtype: torch.dtype) -> None:
    tokens, sizes = 5, (heads * dim, groups * dim, groups * dim)
    joined = torch.randn(tokens, sum(sizes)).to(dtype)  # as a product of all three leaves them
    q, k, v = (part.unflatten(1, (-1, dim)) for part in joined.split(sizes, dim=1))
    angles = torch.randn(tokens, 1, dim // 2).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    keys, values = torch.zeros(2, 8, 4, groups, dim).to(dtype)
    slots = torch.tensor([31, 0, 5, 12, 7])
    scales = (torch.randn(dim).to(dtype), torch.randn(dim).to(dtype)) if normed else None
    got = triton_rows.rotate(q, k, v, LayerCache(keys, values), scales, cos, sin, slots, 1e-6)
    if scales is not None:
        q, k = (TORCH.norm(x, NormWeights(scale, 1e-6)) for x, scale in zip((q, k), scales, strict=True))
    turned = [apply_rope(part, cos, sin) for part in (q, k)]
    assert got.is_contiguous()
    close(got, turned[0])
    close(keys.flatten(0, 1)[slots], turned[1])
    assert values.flatten(0, 1)[slots].equal(v)
    assert keys.flatten(0, 1).any(dim=(1, 2)).sum() == tokens  # and nothing anywhere else


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype: torch.dtype) -> None:
    gate, up = (3 * torch.randn(7, 2 * 1100).to(dtype)).chunk(2, dim=1)
    close(triton_rows.swiglu(gate, up), F.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [True, False])
def test_route(normed: bool, dtype: torch.dtype) -> None:
    logits = torch.randn(5, 12).to(dtype)
    weights, expected = logits.float().softmax(dim=-1).topk(3, dim=-1)
    ids, got = triton_rows.route(logits, 3, normed)
    assert ids.equal(expected)
    close(got.to(dtype), (weights / weights.sum(-1, keepdim=True) if normed else weights).to(dtype))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", OF_PRODUCTS)
@pytest.mark.parametrize(("rows", "num_experts"), [(1, 8), (9, 5), (200, 2), (6, 1)])
def test_experts(rows: int, num_experts: int, dtype: torch.dtype, quantized: bool) -> None:
    choices, dim, columns = min(3, num_experts), 48, 40
    x = torch.randn(rows, dim).to(dtype)
    stacks = [
        torch.randn(num_experts, *size).to(dtype) / 7
        for size in ((columns, dim), (columns, dim), (dim, columns))
    ]
    scales = None
    if quantized:
        pairs = [as_int8(stack) for stack in stacks]
        stacks, scales = [weight for weight, _ in pairs], tuple(scale for _, scale in pairs)
    ids = torch.rand(rows, num_experts).argsort(dim=1)[:, :choices]
    ids = ids.masked_fill(torch.rand(rows, choices) < 0.3, -1)  # these are elsewhere
    ids[-1] = -1
    weights = torch.rand(rows, choices)
    totals = torch.full((1 + num_experts,), 7)
    got = triton_products.experts(x, tuple(stacks), scales, ids, weights, totals)
    plain, unread = ExpertWeights(tuple(stacks), columns, scales), torch.zeros_like(totals)
    close(got, TORCH.experts(x, plain, ids, weights, unread))
    assert not got[-1].any()
    assert (totals - 7).equal(counted(ids, num_experts))


@pytest.mark.parametrize("dtype", OF_PRODUCTS)
@pytest.mark.parametrize("rows", [1, 20, 70])
def test_linear_int8(rows: int, dtype: torch.dtype) -> None:
    weight, scale = as_int8(torch.randn(72, 200))
    x = torch.randn(rows, 200).to(dtype)
    expected = (x.float() @ (weight.float() * scale[:, None]).t()).to(dtype)
    error = 1e-4 if dtype == torch.float32 else 2**-5
    torch.testing.assert_close(
        triton_products.linear_int8(x, weight, scale), expected, atol=error, rtol=error
    )


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"temperature": 1e-231},
        {"top_k": 1},
        {"top_k": 7, "top_p": 0.6},
        {"top_k": 500, "top_p": 0.9},
        {"top_k": 1500, "top_p": 0.8},
        {"top_p": 0.95, "temperature": 0.6},
        {"top_p": 0.999, "temperature": 4.0},
        {"top_p": 1e-9},
    ],
)
@pytest.mark.parametrize("vocab_size", [50, 1024, 4100])
def test_draws(limits: dict[str, float], vocab_size: int) -> None:
    """They are those of plain torch, with many equal logits, too."""
    wider = torch.randn(16, vocab_size + 3).mul(8).round().div(2).to(torch.bfloat16)
    logits = wider[:, :vocab_size]  # as a group leaves them whose ranks' rows are more than the vocabulary
    specs = [
        SampleSpec(
            **{"temperature": 1.0, "top_p": 1.0, "top_k": 0, **limits}, seed=3, position=i, logprobs=None
        )  # type: ignore[arg-type]
        for i in range(len(logits))
    ]
    kernels = dict.fromkeys((torch.float32, torch.bfloat16), GpuKernels())
    ops = CudaOps(torch.device("cpu"), torch.bfloat16, kernels, Chosen(PLAIN, ()), grouped_mm=False)
    assert sampler.sample(logits, specs, ops).equal(sampler.sample(logits, specs, TORCH))


def test_a_draw_at_the_very_end_gets_the_last_token_that_has_any_weight() -> None:
    logits = torch.tensor([0.0, 1.0, 0.5, -torch.inf, -torch.inf]).repeat(3, 1)
    settings = torch.tensor([[1.0] * 3, [5.0] * 3, [1.0] * 3, [0.0, 0.5, 1.0]], dtype=torch.float64)[
        :, :, None
    ]
    kernels = GpuKernels()
    assert kernels.draw_from_all(logits, settings).tolist() == [0, 1, 2]
    keys = kernels.ordering_keys(logits).sort(dim=-1, descending=True).values
    assert kernels.draw_from_ordered(keys, 5, settings).tolist() == [1, 1, 0]
