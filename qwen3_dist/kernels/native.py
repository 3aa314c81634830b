"""The CPU kernels as functions of tensors, which are contiguous, on the CPU, and of one dtype.

Legend: T tokens or rows, D emb_dim, H heads, G KV groups, d head_dim, K choices, E experts, I columns.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_dist.kernels.build import library

_DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
# Pointers, integers and floating-point numbers of each function in `cpu.cpp`, in order.
_SIGNATURES = {
    "linear": "pppppppppppiiiiii",
    "feed_forward": "ppppppppiiii",
    "experts": "ppppppppppiiiiii",
    "attention": "pppppppiiiiiiifi",
    "norm": "pppiifi",
    "rotate": "ppppppppppiiiifi",
    "silu_product": "pppii",
}
_PRODUCTS = ("linear", "feed_forward", "experts")  # which take int8 weights too
_KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_long, "f": ctypes.c_double}


Weights = tuple[Tensor, Tensor | None, Tensor | None]  # weight, scale of int8, bias


class Kernels:
    """The compiled functions for one dtype; they run on as many threads as torch does."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        loaded = ctypes.CDLL(str(path))
        self._functions = {}
        for name, kinds in _SIGNATURES.items():
            for ending in ("", "_int8") if name in _PRODUCTS else ("",):
                function = getattr(loaded, f"{name}_{_DTYPES[dtype]}{ending}")
                function.argtypes = [_KINDS[kind] for kind in kinds]
                function.restype = None
                self._functions[name + ending] = function

    def linear(self, x: Tensor, *parts: Weights) -> list[Tensor]:
        """x [T, D] @ weight [N, D]^T * scale [N] + bias [N] -> [T, N] for each of at most three parts.

        The fp32 scale is that of int8 weights, which all parts must have or none.
        """
        rows, inner = x.shape
        sizes = [weight.shape[0] for weight, _, _ in parts]
        out = x.new_empty(rows * sum(sizes))
        name = "linear" if parts[0][1] is None else "linear_int8"
        none = 3 - len(parts)
        tensors = [
            tensor for of_each in zip(*parts, *((None,) * 3,) * none, strict=True) for tensor in of_each
        ]
        self._run(name, x, *tensors, out, rows, inner, *sizes, *(0,) * none)
        outs = out.split([rows * size for size in sizes])
        return [each.view(rows, size) for each, size in zip(outs, sizes, strict=True)]

    def feed_forward(self, x: Tensor, fc1: Weights, fc2: Weights, fc3: Weights) -> Tensor:
        """fc3(silu(fc1(x)) * fc2(x)) for x [T, D], without biases -> [T, D]."""
        out = torch.empty_like(x)
        weights, scales, _ = zip(fc1, fc2, fc3, strict=True)
        name = "feed_forward" if fc1[1] is None else "feed_forward_int8"
        self._run(name, x, *weights, *scales, out, *x.shape, fc1[0].shape[0])
        return out

    def experts(
        self,
        x: Tensor,
        stacks: tuple[Tensor, Tensor, Tensor],
        scales: tuple[Tensor, Tensor, Tensor] | None,
        ids: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """Sum over a row's choices of weight * expert(x): x [T, D], stacks fc1 and fc2 [E, I, D], fc3 [E, D, I],
        ids int64 and weights fp32 [T, K] -> [T, D]. An id of -1 is no choice. The scales, if the stacks are
        int8, are fp32 [E, I], the same, [E, D]."""
        out = torch.empty_like(x)
        sizes = (*ids.shape, *stacks[2].shape)
        name = "experts" if scales is None else "experts_int8"
        self._run(name, x, *stacks, *(scales or (None, None, None)), ids, weights, out, *sizes)
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


def _kernels_for_product(x: Tensor, is_int8: bool) -> Kernels | None:
    """The kernels if they multiply x [T, D] faster than torch does."""
    few = x.shape[0] <= (16 if x.dtype == torch.bfloat16 else 0)
    return kernels_for(x) if few or is_int8 or not _torch_is_fast(x.dtype) else None


def linears(x: Tensor, *parts: Weights) -> list[Tensor]:
    """`torch.nn.functional.linear` of x [T, D] with each of at most three parts, by whichever is faster.

    An int8 weight has a fp32 scale for each output.
    """
    kernels = _kernels_for_product(x, parts[0][1] is not None)
    if kernels is not None:
        return kernels.linear(x.contiguous(), *parts)
    return [_torch_linear(x, *part) for part in parts]


def feed_forward(x: Tensor, fc1: Weights, fc2: Weights, fc3: Weights) -> Tensor:
    """fc3(silu(fc1(x)) * fc2(x)) for x [T, D], by whichever is faster."""
    kernels = _kernels_for_product(x, fc1[1] is not None)
    if kernels is not None:
        return kernels.feed_forward(x.contiguous(), fc1, fc2, fc3)
    gate, up = _torch_linear(x, *fc1), _torch_linear(x, *fc2)
    kernels = kernels_for(x)
    return _torch_linear(kernels.silu_product(gate, up) if kernels else F.silu(gate) * up, *fc3)


def _torch_linear(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    if scale is None:
        return F.linear(x, weight, bias)
    product = F.linear(x, weight.to(x.dtype)) * scale
    return (product if bias is None else product + bias).to(x.dtype)
