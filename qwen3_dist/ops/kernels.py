"""Kernels: for CPU ranks in C++ that is compiled on the machine, for GPU ranks in Triton; without them torch does the
same, slower."""

from torch import Tensor

from qwen3_dist.ops.cpu.block_kernels import Blocks, Half
from qwen3_dist.ops.cpu.native import Kernels, Weights, kernels_for, linears, rows_of_packed
from qwen3_dist.ops.cuda.kernels import GpuKernels, gpu_kernels_for

__all__ = [
    "Blocks",
    "GpuKernels",
    "Half",
    "Kernels",
    "Weights",
    "gpu_kernels_for",
    "kernels_for",
    "linears",
    "row_kernels_for",
    "rows_of_packed",
]


def row_kernels_for(x: Tensor) -> Kernels | GpuKernels | None:
    """Those of either kind that norm and rotate rows like `x`."""
    return kernels_for(x) or gpu_kernels_for(x)
