"""The Triton kernels of GPU ranks, with tests of each at start. Without them torch is used, with many more
launches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch import Tensor

from qwen3_dist.ops.base import Matrix
from qwen3_dist.ops.batch import LayerCache
from qwen3_dist.ops.kv_codes import CODES
from qwen3_dist.ops.probe import failure, log_failure
from qwen3_dist.quantization import FP4, FP8, INT4, INT8, NIBBLES, Grid


class GpuKernels:
    """The Triton kernels as functions of tensors on one GPU. The constructor raises if Triton is not installed.

    `reads_codes` says whether the kernels for codes of a kind work. Those of `working_kernels` try them when it is
    first asked, since few models have codes and a trial compiles a kernel.
    """

    reads_codes: Callable[[str], bool] = staticmethod(lambda kind: True)

    def __init__(self) -> None:
        from qwen3_dist.ops.cuda import triton_codes, triton_products, triton_rows, triton_sampling

        self.norm = triton_rows.norm
        self.rotate = triton_rows.rotate
        self.swiglu = triton_rows.swiglu
        self.route = triton_rows.route
        self.experts = triton_products.experts
        self.summed = triton_products.summed
        self.linear_int8 = triton_products.linear_int8
        self.fixed_linear = triton_products.fixed_linear
        self.expert_hidden = triton_products.expert_hidden
        self.expert_outputs = triton_products.expert_outputs
        self.linear_codes = triton_codes.linear_codes
        self.fixed_linear_codes = triton_codes.fixed_linear_codes
        self.experts_of_codes = triton_codes.experts_of_codes
        self.hidden_of_codes = triton_codes.hidden_of_codes
        self.outputs_of_codes = triton_codes.outputs_of_codes
        self.log_softmax = triton_sampling.log_softmax
        self.ordering_keys = triton_sampling.ordering_keys
        self.draw_from_ordered = triton_sampling.draw_from_ordered
        self.draw_from_all = triton_sampling.draw_from_all


@functools.cache
def working_kernels(
    device: torch.device, dtype: torch.dtype, deterministic: bool = False
) -> GpuKernels | None:
    """The kernels, if all of them give correct results on small problems of `dtype`; else None, and the log says
    why. Those of deterministic mode are tried only if it is on."""
    what = f"Triton for {str(dtype).removeprefix('torch.')}"
    try:
        kernels = GpuKernels()
    except Exception as error:
        log_failure(what, _INSTEAD, f"{type(error).__name__}: {error}")
        return None
    trials = chain(
        _trials(kernels, device, dtype), _fixed_trials(kernels, device, dtype) if deterministic else ()
    )
    for name, compute, expected in trials:
        reason = failure(compute, expected, tolerance=1e-2)
        if reason is not None:
            log_failure(what, _INSTEAD, f"{name}: {reason}")
            return None
    kernels.reads_codes = functools.cache(lambda kind: _reads_codes(kernels, device, dtype, kind))
    return kernels


def _reads_codes(kernels: GpuKernels, device: torch.device, dtype: torch.dtype, kind: str) -> bool:
    """Multiplies with codes that all say 2. Their scale is a half, and in the second block of 16 inputs a quarter."""
    codes = {FP8: 64, INT8: 2, INT4: 10 * 17, FP4: 4 * 17}[kind]
    wide = 16 if kind in NIBBLES else 32
    stored = torch.full((16, wide), codes, dtype=torch.uint8, device=device)
    if kind not in NIBBLES:
        stored = stored.view(torch.float8_e4m3fn if kind == FP8 else torch.int8)
    grid = Grid(16, 16, nibbles=kind if kind in NIBBLES else None)
    scale = torch.tensor([[0.5, 0.25]], device=device)
    part = Matrix(stored, 16, scale, None, grid)
    ones = torch.ones(2, 32, dtype=dtype, device=device)
    expected = torch.full((2, 16), 24.0, dtype=dtype, device=device)
    reason = failure(lambda: kernels.linear_codes(ones, part), expected, tolerance=1e-2)
    if reason is not None:
        log_failure(f"Triton for {kind} codes", _INSTEAD_OF_CODES, reason)
    return reason is None


_INSTEAD_OF_CODES = (
    "torch makes each weight before it multiplies, several times slower, and experts are outside CUDA graphs"
)
_INSTEAD = "torch runs norms, RoPE, routing, experts and sampling, several times slower"
_Trial = tuple[str, Callable[[], Tensor], Tensor]  # kernel name, computation, expected result


def _trials(kernels: GpuKernels, device: torch.device, dtype: torch.dtype) -> Iterator[_Trial]:
    """Yields a small problem for each kernel. Every dtype represents the expected results exactly, except those of a
    norm and of silu(1) = 0.7311."""

    def full(value: float, *shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    def of(values: list[float] | list[list[int]]) -> Tensor:
        return torch.tensor(values, device=device)

    ones = full(1, 2, 16)
    ascending = torch.arange(16, device=device).to(dtype)
    alternating = of([3.0, -4.0]).to(dtype).repeat(8)[None]
    yield "norm", lambda: kernels.norm(alternating, ones[0], 0.0), of([0.8485, -1.1314]).repeat(8)[None]
    yield "swiglu", lambda: kernels.swiglu(ones, ones), full(0.7311, 2, 16)

    def turned(cache: LayerCache) -> Tensor:
        """Rotation by a quarter of a circle."""
        head = ascending.view(1, 1, 16)
        cos, sin, slots = full(0, 1, 1, 16), full(1, 1, 1, 16), full(0, 1, dtype=torch.int64)
        return kernels.rotate(head, head, head, cache, None, cos, sin, slots, 0.0).flatten()

    def codes() -> Tensor:
        """The keys that `turned` writes as codes."""
        zeros = torch.zeros(2, 1, 1, 1, 16, dtype=torch.uint8, device=device).view(CODES)
        cache = LayerCache(zeros[0], zeros[1], 2.0)
        turned(cache)
        return cache.keys.float().flatten() * cache.key_scale

    quarter = torch.cat([-ascending[8:], ascending[:8]])
    yield "rotate", lambda: turned(LayerCache(full(0, 1, 1, 1, 16), full(0, 1, 1, 1, 16))), quarter
    yield "rotate to fp8", codes, quarter.float()
    logits = of([0.0, 3.0, 1.0, 2.0]).to(dtype)[None]
    yield "route", lambda: kernels.route(logits, 2, True)[0], of([[1, 3]])

    def answers() -> Tensor:
        """One row with two experts, whose outputs silu(1) and 2 * silu(1) have a weight of a quarter each."""
        eye = torch.eye(16, device=device).to(dtype)
        stacks = (torch.stack([eye, eye]), torch.stack([eye, eye]), torch.stack([eye, 2 * eye]))
        weights, totals = full(0.25, 1, 2, dtype=torch.float32), full(0, 3, dtype=torch.int64)
        return kernels.experts(ones[:1], stacks, None, of([[0, 1]]), weights, totals)

    yield "experts", answers, full(0.75 * 0.7311, 1, 16)
    weight, scale = full(2, 16, 16, dtype=torch.int8), full(0.25, 16, dtype=torch.float32)
    yield "linear_int8", lambda: kernels.linear_int8(ones, weight, scale), full(8, 2, 16)
    settings = torch.tensor([0.01, 4, 1.0, 0.5], dtype=torch.float64, device=device)[:, None, None]
    yield "draw_from_all", lambda: kernels.draw_from_all(logits, settings), of([[1]])[0]

    def drawn() -> Tensor:
        keys = kernels.ordering_keys(logits).sort(dim=-1, descending=True).values
        return kernels.draw_from_ordered(keys, 4, settings)

    yield "draw_from_ordered", drawn, of([[1]])[0]


def _fixed_trials(kernels: GpuKernels, device: torch.device, dtype: torch.dtype) -> Iterator[_Trial]:
    """As `_trials`, for the kernels that only deterministic mode uses."""
    ones = torch.ones(2, 16, dtype=dtype, device=device)
    eye = torch.eye(16, device=device).to(dtype)
    stacks, ids = (torch.stack([eye, 2 * eye]),) * 3, torch.tensor([1, -1], device=device)
    yield "fixed_linear", lambda: kernels.fixed_linear(ones, eye, None), ones
    totals = ids.new_zeros(3)
    hidden = lambda: kernels.expert_hidden(ones, stacks, None, ids, totals)[:1]  # noqa: E731
    yield "expert_hidden", hidden, torch.full((1, 16), 4 * 0.8808, device=device)  # silu(2) * 2
    logits = torch.zeros(1, 16, dtype=dtype, device=device)
    yield "log_softmax", lambda: kernels.log_softmax(logits), torch.full((1, 16), -2.7726, device=device)
    outputs = lambda: kernels.expert_outputs(ones, stacks[2], None, ids)[:1]  # noqa: E731
    yield "expert_outputs", outputs, 2 * ones[:1]
