"""The Triton kernels of GPU ranks, with tests of each at start. Without them torch is used, with many more
launches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch import Tensor

from qwen3_dist.ops.batch import LayerCache
from qwen3_dist.ops.probe import failure, log_failure


class GpuKernels:
    """The Triton kernels as functions of tensors on one GPU. The constructor raises if Triton is not installed."""

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
    return kernels


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

    def turned() -> Tensor:
        """Rotation by a quarter of a circle."""
        head, cache = ascending.view(1, 1, 16), LayerCache(full(0, 1, 1, 1, 16), full(0, 1, 1, 1, 16))
        cos, sin, slots = full(0, 1, 1, 16), full(1, 1, 1, 16), full(0, 1, dtype=torch.int64)
        return kernels.rotate(head, head, head, cache, None, cos, sin, slots, 0.0).flatten()

    yield "rotate", turned, torch.cat([-ascending[8:], ascending[:8]])
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
