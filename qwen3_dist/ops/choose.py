"""Chooses a rank's `Ops` at its start, from what works on its device."""

from __future__ import annotations

from typing import NamedTuple

import torch

from qwen3_dist.errors import ConfigError
from qwen3_dist.ops.base import Ops
from qwen3_dist.ops.cpu.deterministic import DeterministicCpuOps
from qwen3_dist.ops.cpu.kernels import load_kernels
from qwen3_dist.ops.cpu.ops import CpuOps
from qwen3_dist.ops.cuda.attention import PLAIN, Chosen, chosen_attention
from qwen3_dist.ops.cuda.deterministic import DeterministicCudaOps
from qwen3_dist.ops.cuda.experts import has_grouped_mm
from qwen3_dist.ops.cuda.kernels import working_kernels
from qwen3_dist.ops.cuda.ops import CudaOps
from qwen3_dist.ops.torch_ops import TorchOps


class AttentionShape(NamedTuple):
    """The sizes of a rank's attention, which decide whether a GPU kernel supports it. `heads` and `groups` are those
    of the rank, `cache_dtype` that of the KV cache."""

    heads: int
    groups: int
    head_dim: int
    block_size: int
    cache_dtype: torch.dtype | None = None  # the activations' if None


def choose_ops(device: torch.device, dtype: torch.dtype, attention: AttentionShape | None = None) -> Ops:
    """The fastest operations that give correct results on `device` for activations of `dtype`.

    On a GPU it tests each kernel on a small problem and logs why one is not used. Without `attention`, attention on a
    GPU is plain torch.
    """
    if device.type == "cuda":
        kernels = {each: working_kernels(device, each) for each in (dtype, torch.float32)}
        chosen = Chosen(PLAIN, ()) if attention is None else chosen_attention(device, dtype, *attention)
        return CudaOps(device, dtype, kernels, chosen, has_grouped_mm(device, dtype))
    kernels_of_dtype, of_fp32 = load_kernels(dtype), load_kernels(torch.float32)
    if kernels_of_dtype is not None and of_fp32 is not None:
        return CpuOps(kernels_of_dtype, of_fp32)
    return TorchOps(f"no kernels for {str(dtype).removeprefix('torch.')}" if of_fp32 else "no C++ compiler")


def deterministic_ops(device: torch.device, dtype: torch.dtype) -> Ops:
    """Operations whose result for a row is the same bits whatever rows, threads and ranks there are beside it.

    Raises ConfigError where there are no such kernels.
    """
    name = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        kernels = {each: working_kernels(device, each, True) for each in (dtype, torch.float32)}
        if None in kernels.values():
            raise ConfigError(
                f"deterministic needs Triton kernels for {name} and float32, which do not work on this GPU (the log "
                "says why); set deterministic=false"
            )
        return DeterministicCudaOps(device, dtype, kernels)
    kernels_of_dtype, of_fp32 = load_kernels(dtype, True), load_kernels(torch.float32, True)
    if of_fp32 is None:
        raise ConfigError(
            "deterministic needs the CPU kernels, which could not be built (the log says why); install g++ or set "
            "deterministic=false"
        )
    if kernels_of_dtype is None:
        raise ConfigError(
            f"deterministic has no CPU kernels for dtype={name}; set dtype to bfloat16 or float32"
        )
    return DeterministicCpuOps(kernels_of_dtype, of_fp32)
