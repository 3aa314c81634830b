"""Kernels for GPU ranks, in Triton."""
