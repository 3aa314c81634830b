"""Kernels for GPU ranks, in Triton; without it torch does the same, in many more launches."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qwen3_dist.kernels.probe import failure, log_failure


class GpuKernels:
    """The Triton kernels as functions of tensors on one GPU. Raises where Triton is not installed."""

    def __init__(self) -> None:
        from qwen3_dist.kernels import triton_products, triton_rows, triton_sampling

        self.norm = triton_rows.norm
        self.rotate = triton_rows.rotate
        self.swiglu = triton_rows.swiglu
        self.route = triton_rows.route
        self.experts = triton_products.experts
        self.summed = triton_products.summed
        self.linear_int8 = triton_products.linear_int8
        self.ordering_keys = triton_sampling.ordering_keys
        self.draw_from_ordered = triton_sampling.draw_from_ordered
        self.draw_from_all = triton_sampling.draw_from_all


def gpu_kernels_for(x: Tensor) -> GpuKernels | None:
    """The kernels that can work on `x`; None on a CPU, and where Triton cannot compile for this card and dtype."""
    return _kernels(x.device, x.dtype) if x.is_cuda else None


@functools.cache
def _kernels(device: torch.device, dtype: torch.dtype) -> GpuKernels | None:
    """The kernels, if the simplest of them works; a kernel that then fails on a rank's own shapes ends its start."""
    x = torch.tensor([[3.0, -4.0]], device=device).to(dtype)
    expected = torch.tensor([[0.8485, -1.1314]], device=device)
    reason = failure(lambda: GpuKernels().norm(x, torch.ones_like(x[0]), 0.0), expected, tolerance=1e-2)
    if reason is None:
        return GpuKernels()
    name = str(dtype).removeprefix("torch.")
    log_failure(f"Triton kernels for {name}", "torch computes rows and experts, several times slower", reason)
    return None
