"""The CPU kernels as functions of tensors, which are contiguous, on the CPU, and of one dtype.

Legend: T tokens or rows, D emb_dim, H heads, G KV groups, d head_dim, K choices, E experts, I columns.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_dist.ops.cpu.build import library
from qwen3_dist.ops.cuda.kernels import gpu_kernels_for
from qwen3_dist.ops.host_memory import zeros

_FEW_ROWS = 64  # of a product with int8 weights on a GPU, for which widening them first would cost more
_DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
# Pointers, integers and floating-point numbers of each function in `cpu.cpp`, in order.
_SIGNATURES = {
    "pack": "ppiii",
    "padded": "i",
    "packed_rows": "pppiii",
    "linear": "pppppppppppiiiiii",
    "attention_half": "ppppppppppppiiiifi",
    "blocks": "pipppppppppiiiipfpii",
    "feed_forward_half": "pppifi",
    "experts_half": "pppifi",
    "experts": "pppppppppppiiiiii",
    "attention": "ppppppppiiiiiiifi",
    "norm": "pppiifi",
    "largest": "ppiiii",
    "likeliest": "ppiiii",
    "rotate": "ppppppppppiiiifi",
}
# Those that take int8 weights too.
_PRODUCTS = (
    "pack",
    "padded",
    "linear",
    "experts",
    "attention_half",
    "feed_forward_half",
    "experts_half",
    "blocks",
)
_RETURNING = ("padded", "blocks")  # an integer
_KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_long, "f": ctypes.c_double}


class Weights(NamedTuple):
    """What a product takes. The weight is [outputs, D], or what `pack` made of it."""

    weight: Tensor
    outputs: int
    scale: Tensor | None = None  # fp32 [outputs] of an int8 weight
    bias: Tensor | None = None  # [outputs]

    @property
    def is_packed(self) -> bool:
        return self.weight.dim() == 3


class Kernels:
    """The compiled functions for one dtype; they run on as many threads as torch does. Weights are packed."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        loaded = ctypes.CDLL(str(path))
        self._functions = {}
        for name, kinds in _SIGNATURES.items():
            for ending in ("", "_int8") if name in _PRODUCTS else ("",):
                function = getattr(loaded, f"{name}_{_DTYPES[dtype]}{ending}")
                function.argtypes = [_KINDS[kind] for kind in kinds]
                function.restype = ctypes.c_long if name in _RETURNING else None
                self._functions[name + ending] = function
        self.panel: int = loaded.panel_outputs()

    def pack(self, weight: Tensor) -> Tensor:
        """[N, D] or [E, N, D] as products read it: each matrix [N / panel, D, panel], zeros at its ends; see
        `cpu/linear.h`."""
        ending = "_int8" if weight.dtype == torch.int8 else ""
        outputs, inner = weight.shape[-2:]
        sizes = (-(-outputs // self.panel), self._functions[f"padded{ending}"](inner), self.panel)
        stack = weight if weight.dim() == 3 else weight[None]
        shape = (len(stack), *sizes)
        packed = zeros(shape, weight.dtype, weight.device)  # in huge pages, which are read faster
        for matrix, place in zip(stack, packed, strict=True):
            self.run(f"pack{ending}", matrix.contiguous(), place, outputs, inner)
        return packed if weight.dim() == 3 else packed[0]

    def packed_rows(self, packed: Tensor, ids: Tensor, inner: int) -> Tensor:
        """Rows `ids` [T] int64 of the matrix [N, inner] that was packed -> [T, inner]."""
        out = packed.new_empty(len(ids), inner)
        self.run("packed_rows", packed, ids, out, len(ids), inner)
        return out

    def linear(self, x: Tensor, *parts: Weights) -> list[Tensor]:
        """x [T, D] @ weight [N, D]^T * scale [N] + bias [N] -> [T, N] for each of at most three parts.

        Either all parts have int8 weights with scales or none.
        """
        rows, inner = x.shape
        sizes = [part.outputs for part in parts]
        out = x.new_empty(rows * sum(sizes))
        name = "linear" if parts[0].scale is None else "linear_int8"
        none = (None,) * (3 - len(parts))
        tensors: list[Tensor | None] = []
        for of_each in ("weight", "scale", "bias"):
            tensors += [*(getattr(part, of_each) for part in parts), *none]
        self.run(name, x, *tensors, out, rows, inner, *sizes, *(0 for _ in none))
        outs = out.split([rows * size for size in sizes])
        return [each.view(rows, size) for each, size in zip(outs, sizes, strict=True)]

    def experts(
        self,
        x: Tensor,
        stacks: tuple[Tensor, Tensor, Tensor],
        columns: int,
        scales: tuple[Tensor, Tensor, Tensor] | None,
        ids: Tensor,
        weights: Tensor,
        counts: Tensor | None = None,
    ) -> Tensor:
        """Sum over a row's choices of weight * expert(x): x [T, D], stacks of E packed matrices, fc1 and fc2
        [columns, D], fc3 [D, columns], ids int64 and weights fp32 [T, K] -> [T, D]. An id of -1 is no choice.
        The scales, if the stacks are int8, are fp32 [E, columns], the same, [E, D]. How often each expert was
        chosen is added to `counts` [E] int64."""
        out = torch.empty_like(x)
        sizes = (*ids.shape, stacks[0].shape[0], x.shape[1], columns)
        name = "experts" if scales is None else "experts_int8"
        self.run(name, x, *stacks, *(scales or (None, None, None)), ids, weights, out, counts, *sizes)
        return out

    def attention(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        table_rows: Tensor,
        context_lens: Tensor,
        starts: Tensor,
        window: int | None,
    ) -> Tensor:
        """Causal attention of q [T, H, d] over KV blocks [blocks, block_size, G, d] -> [T, H, d].

        Sequence s has rows `starts[s]` to `starts[s + 1]` of q, `context_lens[s]` tokens with these, and its blocks
        in row `table_rows[s]` of `tables` int32 [rows, B]; the others are int64.
        """
        out = torch.empty_like(q)
        _, heads, dim = q.shape
        _, block_size, groups, _ = keys.shape
        sizes = (len(context_lens), heads, groups, dim, block_size, tables.shape[1], window or 0)
        self.run(
            "attention", q, keys, values, out, tables, table_rows, context_lens, starts, *sizes, dim**-0.5
        )
        return out

    def norm(self, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        """RMSNorm over the last dimension, with Qwen3's order of rounding."""
        out = torch.empty_like(x)
        dim = x.shape[-1]
        self.run("norm", x, scale, out, x.numel() // dim, dim, eps)
        return out

    def largest(self, x: Tensor, width: int) -> Tensor:
        """The largest of each `width` numbers of a row, x [T, N] -> fp32 [T, ceil(N / width)]."""
        rows, columns = x.shape
        out = x.new_empty(rows, -(-columns // width), dtype=torch.float32)
        self.run("largest", x, out, rows, columns, width)
        return out

    def likeliest(self, x: Tensor) -> Tensor:
        """Where the largest number of each row of x [T, N] lies, of equals the first -> int64 [T]. Rows themselves
        are contiguous."""
        rows, columns = x.shape
        assert x.stride(1) == 1
        out = x.new_empty(rows, dtype=torch.int64)
        self.run("likeliest", x.data_ptr(), out, rows, columns, x.stride(0))
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
    ) -> Tensor:
        """Norms (by the `scales` of q and k) and rotates q [T, H, d] in place and k [T, G, d] into its `slots`
        [T] of the cache; v [T, G, d] goes there too. cos and sin hold d numbers for each token. Returns q."""
        q_scale, k_scale = scales or (None, None)
        (tokens, heads, dim), groups = q.shape, k.shape[1]
        tensors = (q, k, v, keys, values, q_scale, k_scale, cos, sin, slots)
        self.run("rotate", *tensors, tokens, heads, groups, dim, eps)
        return q

    def run(self, name: str, *values: Tensor | float | None) -> Any:
        """Calls function `name` with its arguments but the last, the number of threads; gives what it returns."""
        arguments: list[float | None] = []
        for value in values:
            if isinstance(value, Tensor):
                assert value.is_contiguous(), f"{name} needs contiguous tensors"
                arguments.append(value.data_ptr())
            else:
                arguments.append(value)
        return self._functions[name](*arguments, torch.get_num_threads())


@functools.cache
def _kernels(dtype: torch.dtype) -> Kernels | None:
    path = library() if dtype in _DTYPES else None
    return Kernels(path, dtype) if path is not None else None


def kernels_for(x: Tensor) -> Kernels | None:
    """The kernels that can work on `x`; None on a GPU, for other dtypes, and where none were built."""
    return _kernels(x.dtype) if x.device.type == "cpu" else None


def rows_of_packed(packed: Tensor, ids: Tensor, inner: int) -> Tensor:
    """Rows `ids` [T] of the matrix [N, inner] that was packed -> [T, inner]."""
    kernels = kernels_for(packed)
    assert kernels is not None  # it was they who packed it
    return kernels.packed_rows(packed, ids.contiguous(), inner)


def linears(x: Tensor, *parts: Weights) -> list[Tensor]:
    """`torch.nn.functional.linear` of x [T, D] with each of at most three parts."""
    kernels = kernels_for(x) if parts[0].is_packed else None
    if kernels is not None:
        return kernels.linear(x.contiguous(), *parts)
    return [_torch_linear(x, part) for part in parts]


def _torch_linear(x: Tensor, part: Weights) -> Tensor:
    if part.scale is None:
        return F.linear(x, part.weight, part.bias)
    kernels = gpu_kernels_for(x) if len(x) <= _FEW_ROWS else None
    if kernels is not None:
        product = kernels.linear_int8(x.contiguous(), part.weight, part.scale)
    elif x.dtype == torch.float16:  # which sums of whole integers overflow
        product = F.linear(x, part.weight.to(x.dtype).mul_(part.scale[:, None]))
    else:
        product = F.linear(x, part.weight.to(x.dtype)).mul_(part.scale)
    return product if part.bias is None else product + part.bias
