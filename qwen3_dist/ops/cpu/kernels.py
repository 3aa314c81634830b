"""The CPU kernels as functions of tensors. All tensors are contiguous, on the CPU, and of one dtype.

Legend: T tokens or rows, D emb_dim, H heads, G KV groups, d head_dim, K choices, E experts, I columns.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_dist.ops.base import ExpertWeights, Matrix
from qwen3_dist.ops.batch import LayerCache
from qwen3_dist.ops.cpu.build import library
from qwen3_dist.ops.cpu.structs import address, caches_of, check_sizes
from qwen3_dist.ops.host_memory import zeros
from qwen3_dist.ops.quantize import row_scales
from qwen3_dist.quantization import FP4, FP8, INT4, INT8, Grid

_DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
# Pointers, integers and floating-point numbers of each function in `cpu.cpp`, in order.
_SIGNATURES = {
    "pack": "ppiii",
    "padded": "i",
    "packed_rows": "pppiii",
    "linear": "pppppppppppiiiiii",
    "attention_kernel": "pppppppi",
    "blocks": "pipppppppii",
    "feed_forward_kernel": "pppii",
    "experts_kernel": "pppii",
    "experts": "pppppppppppiiiiii",
    "expert_hidden": "ppppppppiiii",
    "expert_outputs": "ppppppiiii",
    "swiglu": "pppiiii",
    "route": "pppiiii",
    "attention": "pppppppiiiiiiifi",
    "norm": "pppiifi",
    "block_max": "ppiiii",
    "argmax": "ppiiii",
    "rotate": "pppppppppiiiifi",
}
# Functions that exist for narrow weights too, by the ends of their names.
_NARROW = {torch.int8: "_int8", torch.float8_e4m3fn: "_fp8", torch.uint8: "_4bit"}
GROUPED = (torch.float8_e4m3fn, torch.uint8)  # packed weights whose scales are those of groups
_KINDS_OF_CODES = {FP8: 0, INT8: 1, INT4: 2, FP4: 3}  # `Kind` in `cpu/codes.h`
_PRODUCTS = (
    "pack",
    "padded",
    "linear",
    "experts",
    "expert_hidden",
    "expert_outputs",
    "attention_kernel",
    "feed_forward_kernel",
    "experts_kernel",
    "blocks",
)
_RETURNING = ("padded", "blocks")  # functions that return an integer
_KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_long, "f": ctypes.c_double}


class Kernels:
    """The compiled functions for one dtype. They use torch's number of threads. Weights are packed (`pack`)."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        loaded = ctypes.CDLL(str(path))
        check_sizes(loaded)
        self._functions = {}
        for name, kinds in _SIGNATURES.items():
            for suffix in ("", *_NARROW.values()) if name in _PRODUCTS else ("",):
                function = getattr(loaded, f"{name}_{_DTYPES[dtype]}{suffix}")
                function.argtypes = [_KINDS[kind] for kind in kinds]
                function.restype = ctypes.c_long if name in _RETURNING else None
                self._functions[name + suffix] = function
        self.panel: int = loaded.panel_outputs()

    def pack(self, weight: Tensor) -> Tensor:
        """Packs a weight [N, D] or [E, N, D] for products: each matrix becomes [ceil(N / panel), D, panel], padded
        with zeros; see `cpu/panels.h`. Codes of 4 bits are two in a byte before and after."""
        suffix, per_byte = suffix_of(weight), 2 if weight.dtype == torch.uint8 else 1
        outputs, inner = weight.shape[-2], weight.shape[-1] * per_byte
        depth = self._functions[f"padded{suffix}"](inner)
        sizes = (-(-outputs // self.panel), depth, self.panel // per_byte)
        stack = weight if weight.dim() == 3 else weight[None]
        shape = (len(stack), *sizes)
        packed = zeros(shape, weight.dtype, weight.device)  # huge pages, which are faster to read
        for matrix, place in zip(stack, packed, strict=True):
            self.run(f"pack{suffix}", matrix.contiguous(), place, outputs, inner)
        return packed if weight.dim() == 3 else packed[0]

    def pack_scales(
        self, scale: Tensor, grid: Grid, outputs: int, kind: str = FP8, zero: Tensor | None = None,
        order: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Packs what belongs to codes [..., N, D] of `kind`, scales and zeros [..., blocks of outputs, blocks of
        inputs] and order [..., D], as `cpu/codes.h` has it, fp32 [..., size]."""
        header = scale.new_zeros(*scale.shape[:-2], self.panel)
        ordered = order.shape[-1] if order is not None else 0
        numbers = (
            grid.columns,
            grid.first_column,
            scale.shape[-1],
            _KINDS_OF_CODES[kind],
            zero is not None,
            ordered,
        )
        header[..., : len(numbers)] = header.new_tensor(numbers)
        panels = self._by_panel(scale, grid, outputs)
        if zero is not None:
            zeros = _as_floats(self._by_panel(zero, grid, outputs))
            panels = torch.cat([panels, zeros], dim=-1)
        parts = [header, panels.flatten(-3)]
        if order is not None:
            parts.insert(1, _as_floats(order))
        return torch.cat(parts, dim=-1)

    def _by_panel(self, numbers: Tensor, grid: Grid, outputs: int) -> Tensor:
        """Numbers of blocks [..., blocks of outputs, groups] -> [..., panels, groups, panel]."""
        by_output = F.pad(row_scales(numbers, grid, range(outputs)), (0, 0, 0, -outputs % self.panel))
        return by_output.unflatten(-2, (-1, self.panel)).transpose(-1, -2)

    def packed_rows(self, packed: Tensor, ids: Tensor, inner: int) -> Tensor:
        """Rows `ids` [T] int64 of a packed matrix [N, inner] -> [T, inner]."""
        out = packed.new_empty(len(ids), inner)
        self.run("packed_rows", packed, ids, out, len(ids), inner)
        return out

    def linear(self, x: Tensor, *parts: Matrix) -> list[Tensor]:
        """x [T, D] @ weight [N, D]^T * scale [N] + bias [N] -> [T, N] for each of at most three parts.

        All weights have one dtype.
        """
        rows, inner = x.shape
        sizes = [part.outputs for part in parts]
        out = x.new_empty(rows * sum(sizes))
        name = f"linear{suffix_of(parts[0].weight)}"
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
        weights: ExpertWeights,
        ids: Tensor,
        routing: Tensor,
        counts: Tensor | None = None,
    ) -> Tensor:
        """Sum over the K choices of routing * expert(x) -> [T, D]. x [T, D]; `weights` packed; ids int64 [T, K], -1
        for no expert; routing fp32 [T, K]. Adds the number of rows of each expert to `counts` [E] int64."""
        out = torch.empty_like(x)
        sizes = (*ids.shape, len(weights.stacks[0]), x.shape[1], weights.columns)
        name = f"experts{suffix_of(weights.stacks[0])}"
        scales = weights.scales or (None, None, None)
        self.run(name, x, *weights.stacks, *scales, ids, routing, out, counts, *sizes)
        return out

    def expert_hidden(self, x: Tensor, weights: ExpertWeights, ids: Tensor, counts: Tensor) -> Tensor:
        """silu(fc1 x) * fc2 x by the expert of each row -> [T, I]. x [T, D]; `weights` packed; ids int64 [T], -1 for
        no expert, whose row is 0. Adds the number of rows of each expert to `counts` [E] int64."""
        fc1, fc2, _ = weights.stacks
        one, two, _ = weights.scales or (None, None, None)
        out = x.new_zeros(len(x), weights.columns)
        name = f"expert_hidden{suffix_of(fc1)}"
        self.run(name, x, fc1, fc2, one, two, ids, out, counts, len(x), len(fc1), x.shape[1], weights.columns)
        return out

    def expert_outputs(
        self,
        hidden: Tensor,
        weights: ExpertWeights,
        ids: Tensor,
        routing: Tensor,
        outputs: int,
        which: int = 2,
    ) -> Tensor:
        """routing * fc3 hidden by the expert of each row -> [T, outputs]. hidden [T, I]; ids int64 [T], -1 for no
        expert, whose row is 0; routing fp32 [T]. `which` is another matrix in the place of fc3: 0 is fc1, 1 is fc2."""
        stack, scale = weights.stacks[which], weights.scales[which] if weights.scales else None
        out = hidden.new_empty(len(hidden), outputs)
        name = f"expert_outputs{suffix_of(stack)}"
        sizes = (len(hidden), len(stack), outputs, hidden.shape[1])
        self.run(name, hidden, stack, scale, ids, routing, out, *sizes)
        return out

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up, both [T, I] with contiguous rows -> [T, I]."""
        assert gate.stride(1) == up.stride(1) == 1
        out = gate.new_empty(gate.shape)
        sizes = (*gate.shape, gate.stride(0), up.stride(0))
        self.run("swiglu", gate.data_ptr(), up.data_ptr(), out, *sizes)
        return out

    def route(self, logits: Tensor, choices: int, normed: bool) -> tuple[Tensor, Tensor]:
        """Ids int64 and weights fp32 [T, K] of the top experts of logits [T, E], as `Ops.route`."""
        tokens, experts = logits.shape
        ids = logits.new_empty(tokens, choices, dtype=torch.int64)
        weights = logits.new_empty(tokens, choices, dtype=torch.float32)
        self.run("route", logits, ids, weights, tokens, experts, choices, normed)
        return ids, weights

    def attention(
        self,
        q: Tensor,
        cache: LayerCache,
        tables: Tensor,
        table_rows: Tensor,
        context_lens: Tensor,
        starts: Tensor,
        window: int | None,
    ) -> Tensor:
        """Causal attention of q [T, H, d] over a layer's KV blocks -> [T, H, d].

        Sequence s has rows `starts[s]` to `starts[s + 1]` of q, `context_lens[s]` tokens including these, and its
        blocks in row `table_rows[s]` of `tables` int32 [rows, B]. The other index tensors are int64.
        """
        out = torch.empty_like(q)
        _, heads, dim = q.shape
        _, block_size, groups, _ = cache.keys.shape
        sizes = (len(context_lens), heads, groups, dim, block_size, tables.shape[1], window or 0)
        tensors, layer = (tables, table_rows, context_lens, starts), caches_of([cache])
        self.run("attention", q, address(layer), out, *tensors, *sizes, dim**-0.5)
        return out

    def norm(self, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        """RMSNorm over the last dimension, with Qwen3's order of rounding."""
        out = torch.empty_like(x)
        dim = x.shape[-1]
        self.run("norm", x, scale, out, x.numel() // dim, dim, eps)
        return out

    def block_max(self, x: Tensor, width: int) -> Tensor:
        """The maximum of each run of `width` numbers of a row, x [T, N] -> fp32 [T, ceil(N / width)]."""
        rows, columns = x.shape
        out = x.new_empty(rows, -(-columns // width), dtype=torch.float32)
        self.run("block_max", x, out, rows, columns, width)
        return out

    def argmax(self, x: Tensor) -> Tensor:
        """The argmax of each row of x [T, N], the first of equal ones -> int64 [T]. Rows are contiguous."""
        rows, columns = x.shape
        assert x.stride(1) == 1
        out = x.new_empty(rows, dtype=torch.int64)
        self.run("argmax", x.data_ptr(), out, rows, columns, x.stride(0))
        return out

    def rotate(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: LayerCache,
        scales: tuple[Tensor, Tensor] | None,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        eps: float,
    ) -> Tensor:
        """Applies RMSNorm (`scales` of q and k, None for no norm) and RoPE to q [T, H, d], in place, and to k [T, G,
        d]. Writes k and v [T, G, d] to their `slots` [T] of the cache. cos and sin are [T, 1, d]. Returns q."""
        q_scale, k_scale = scales or (None, None)
        (tokens, heads, dim), groups = q.shape, k.shape[1]
        tensors, layer = (q_scale, k_scale, cos, sin, slots), caches_of([cache])
        self.run("rotate", q, k, v, address(layer), *tensors, tokens, heads, groups, dim, eps)
        return q

    def run(self, name: str, *values: Tensor | float | None) -> Any:
        """Calls function `name` with these arguments and the number of threads, which is its last argument. Returns
        its result."""
        arguments: list[float | None] = []
        for value in values:
            if isinstance(value, Tensor):
                assert value.is_contiguous(), f"{name} needs contiguous tensors"
                arguments.append(value.data_ptr())
            else:
                arguments.append(value)
        return self._functions[name](*arguments, torch.get_num_threads())


def _as_floats(integers: Tensor) -> Tensor:
    """The bytes of integers [..., n] as fp32 numbers."""
    return integers.clone(memory_format=torch.contiguous_format).view(torch.float32)


def suffix_of(weight: Tensor) -> str:
    """The end of the names of functions for weights of this dtype."""
    return _NARROW.get(weight.dtype, "")


@functools.cache
def load_kernels(dtype: torch.dtype, deterministic: bool = False) -> Kernels | None:
    """The kernels for activations of `dtype`; None if they could not be built or do not support the dtype."""
    path = library(deterministic) if dtype in _DTYPES else None
    return Kernels(path, dtype) if path is not None else None
