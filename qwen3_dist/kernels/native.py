"""The CPU kernels as functions of tensors, which are contiguous, on the CPU, and of one dtype.

Legend: T tokens or rows, D emb_dim, H heads, G KV groups, d head_dim, K choices, E experts, I columns.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from qwen3_dist.kernels.build import library

_DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
# Pointers, integers and floating-point numbers of each function in `cpu.cpp`, in order.
_SIGNATURES = {
    "linear": "ppppiiii",
    "experts": "pppppppiiiiii",
    "attention": "pppppppiiiiiiifi",
    "norm": "pppiifi",
    "rotate": "ppppppppppiiiifi",
    "silu_product": "pppii",
}
_KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_long, "f": ctypes.c_double}


class Kernels:
    """The compiled functions for one dtype; they run on as many threads as torch does."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        loaded = ctypes.CDLL(str(path))
        self._functions = {}
        for name, kinds in _SIGNATURES.items():
            function = getattr(loaded, f"{name}_{_DTYPES[dtype]}")
            function.argtypes = [_KINDS[kind] for kind in kinds]
            function.restype = None
            self._functions[name] = function

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, D] @ weight [N, D]^T + bias [N] -> [T, N]."""
        (rows, inner), outputs = x.shape, weight.shape[0]
        out = x.new_empty(rows, outputs)
        self._run("linear", x, weight, bias, out, rows, outputs, inner)
        return out

    def experts(
        self, x: Tensor, fc1: Tensor, fc2: Tensor, fc3: Tensor, ids: Tensor, weights: Tensor
    ) -> Tensor:
        """Sum over a row's choices of weight * expert(x): x [T, D], fc1 and fc2 [E, I, D], fc3 [E, D, I],
        ids int64 and weights fp32 [T, K] -> [T, D]. An id of -1 is no choice."""
        out = torch.empty_like(x)
        sizes = (*ids.shape, *fc3.shape)
        self._run("experts", x, fc1, fc2, fc3, ids, weights, out, *sizes)
        return out

    def attention(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        context_lens: Tensor,
        starts: Tensor,
        window: int | None,
    ) -> Tensor:
        """Causal attention of q [T, H, d] over KV blocks [blocks, block_size, G, d] -> [T, H, d].

        Sequence s has rows `starts[s]` to `starts[s + 1]` of q, `context_lens[s]` tokens with these, and
        its blocks in `tables[s]`; all int64.
        """
        out = torch.empty_like(q)
        _, heads, dim = q.shape
        _, block_size, groups, _ = keys.shape
        sizes = (tables.shape[0], heads, groups, dim, block_size, tables.shape[1], window or 0)
        self._run("attention", q, keys, values, out, tables, context_lens, starts, *sizes, dim**-0.5)
        return out

    def norm(self, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        """RMSNorm over the last dimension, with Qwen3's order of rounding."""
        out = torch.empty_like(x)
        dim = x.shape[-1]
        self._run("norm", x, scale, out, x.numel() // dim, dim, eps)
        return out

    def rotate(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: Tensor,
        values: Tensor,
        scales: tuple[Tensor, Tensor] | None,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        eps: float,
    ) -> None:
        """Norms (by the `scales` of q and k) and rotates q [T, H, d] in place and k [T, G, d] into its `slots`
        [T] of the cache; v [T, G, d] goes there too. cos and sin hold d numbers for each token."""
        q_scale, k_scale = scales or (None, None)
        (tokens, heads, dim), groups = q.shape, k.shape[1]
        tensors = (q, k, v, keys, values, q_scale, k_scale, cos, sin, slots)
        self._run("rotate", *tensors, tokens, heads, groups, dim, eps)

    def silu_product(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up."""
        out = torch.empty_like(gate)
        self._run("silu_product", gate, up, out, gate.numel())
        return out

    def _run(self, name: str, *values: Tensor | float | None) -> None:
        arguments: list[float | None] = []
        for value in values:
            if isinstance(value, Tensor):
                assert value.is_contiguous(), f"{name} needs contiguous tensors"
                arguments.append(value.data_ptr())
            else:
                arguments.append(value)
        self._functions[name](*arguments, torch.get_num_threads())


@functools.cache
def _kernels(dtype: torch.dtype) -> Kernels | None:
    path = library() if dtype in _DTYPES else None
    return Kernels(path, dtype) if path is not None else None


def kernels_for(x: Tensor) -> Kernels | None:
    """The kernels that can work on `x`; None on a GPU, for other dtypes, and where none were built."""
    return _kernels(x.dtype) if x.device.type == "cpu" else None


@functools.cache
def _torch_is_fast(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies `dtype` in hardware, so that oneDNN beats our kernel for many rows."""
    return dtype == torch.float32 or torch.cpu._is_avx512_bf16_supported()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` for x [T, D], by whichever is faster for so many rows."""
    few = x.shape[0] <= (16 if x.dtype == torch.bfloat16 else 0)
    kernels = kernels_for(x) if few or not _torch_is_fast(x.dtype) else None
    if kernels is None:
        return torch.nn.functional.linear(x, weight, bias)
    return kernels.linear(x.contiguous(), weight, bias)
