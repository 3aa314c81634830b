"""Kernels for CPU ranks, in C++ that is compiled on the machine; without it torch does the same, slower."""

from qwen3_dist.kernels.native import Kernels, kernels_for, linear

__all__ = ["Kernels", "kernels_for", "linear"]
