"""Kernels for CPU ranks, in C++ that is compiled on the machine; without it torch does the same, slower."""

from qwen3_dist.kernels.halves import Blocks, Half
from qwen3_dist.kernels.native import Kernels, Weights, kernels_for, linears, rows_of_packed

__all__ = ["Blocks", "Half", "Kernels", "Weights", "kernels_for", "linears", "rows_of_packed"]
