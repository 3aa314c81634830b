"""The structures of the C++ kernels, with the same members as in the headers. `check_sizes` compares the sizes.

Pointers are addresses of tensors, which must stay where they are; 0 is null.
"""

# ruff: noqa: RUF012 - `_fields_` is ctypes's own class variable
from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from qwen3_dist.ops.batch import LayerCache

_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float


class Group(ctypes.Structure):
    """`Group` in `collectives.h`."""

    _fields_ = (
        ("flags", _POINTER),
        ("slots", _POINTER),
        ("rank", _LONG),
        ("size", _LONG),
        ("slot_bytes", _LONG),
        ("wait", _POINTER),
        ("waited_ticks", _LONG),
    )


class Cache(ctypes.Structure):
    """`Cache` in `cache.h`."""

    _fields_ = (
        ("keys", _POINTER),
        ("values", _POINTER),
        ("key_scale", _FLOAT),
        ("value_scale", _FLOAT),
        ("is_fp8", _LONG),
    )


class AttentionMetadata(ctypes.Structure):
    """`AttentionMetadata` in `block_kernels.h`."""

    _fields_ = (
        ("slots", _POINTER),
        ("tables", _POINTER),
        ("table_rows", _POINTER),
        ("context_lens", _POINTER),
        ("starts", _POINTER),
        ("tokens", _LONG),
        ("sequences", _LONG),
        ("block_size", _LONG),
        ("width", _LONG),
    )


class AttentionKernel(ctypes.Structure):
    """`AttentionKernel` in `block_kernels.h`."""

    _fields_ = (
        ("norm_scale", _POINTER),
        ("q_scale", _POINTER),
        ("k_scale", _POINTER),
        ("weights", _POINTER * 4),
        ("scales", _POINTER * 4),
        ("biases", _POINTER * 4),
        ("dim", _LONG),
        ("heads", _LONG),
        ("groups", _LONG),
        ("head_dim", _LONG),
        ("window", _LONG),
        ("eps", _FLOAT),
    )


class FeedForwardKernel(ctypes.Structure):
    """`FeedForwardKernel` in `block_kernels.h`."""

    _fields_ = (
        ("norm_scale", _POINTER),
        ("weights", _POINTER * 3),
        ("scales", _POINTER * 3),
        ("dim", _LONG),
        ("inner", _LONG),
        ("eps", _FLOAT),
    )


class ExpertsKernel(ctypes.Structure):
    """`ExpertsKernel` in `block_kernels.h`."""

    _fields_ = (
        ("norm_scale", _POINTER),
        ("gate", _POINTER),
        ("weights", _POINTER * 3),
        ("scales", _POINTER * 3),
        ("places", _POINTER),
        ("counts", _POINTER),
        ("tables", _LONG),
        ("experts", _LONG),
        ("local_experts", _LONG),
        ("choices", _LONG),
        ("norms_weights", _LONG),
        ("dim", _LONG),
        ("inner", _LONG),
        ("eps", _FLOAT),
    )


class Head(ctypes.Structure):
    """`Head` in `block_kernels.h`."""

    _fields_ = (
        ("norm_scale", _POINTER),
        ("weight", _POINTER),
        ("scale", _POINTER),
        ("dim", _LONG),
        ("outputs", _LONG),
        ("eps", _FLOAT),
    )


class Logits(ctypes.Structure):
    """`Logits` in `block_kernels.h`."""

    _fields_ = (
        ("head", _POINTER),
        ("rows", _POINTER),
        ("count", _LONG),
        ("out", _POINTER),
    )


class Block(ctypes.Structure):
    """`Block` in `block_kernels.h`."""

    _fields_ = (
        ("attention", _POINTER),
        ("dense", _POINTER),
        ("experts", _POINTER),
    )


_ALL = (
    Group,
    Cache,
    AttentionMetadata,
    AttentionKernel,
    FeedForwardKernel,
    ExpertsKernel,
    Head,
    Logits,
    Block,
)


def check_sizes(loaded: ctypes.CDLL) -> None:
    """Asserts that each structure has the same size in the library as here."""
    for structure in _ALL:
        theirs, ours = getattr(loaded, f"size_of_{structure.__name__}")(), ctypes.sizeof(structure)
        assert theirs == ours, f"{structure.__name__} has {theirs} bytes in C++ and {ours} in Python"


def address(value: Tensor | ctypes.Structure | ctypes.Array | None) -> int:  # type: ignore[type-arg]
    """The address of a tensor's data or of a structure; 0 for None."""
    if value is None:
        return 0
    return value.data_ptr() if isinstance(value, Tensor) else ctypes.addressof(value)


def addresses(values: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    """An array of pointers to the values."""
    return (_POINTER * len(values))(*map(address, values))


def caches_of(layers: Sequence[LayerCache]) -> ctypes.Array[Cache]:
    """The caches of layers, whose tensors are contiguous."""
    return (Cache * len(layers))(*map(_cache, layers))


def _cache(layer: LayerCache) -> Cache:
    assert layer.keys.is_contiguous() and layer.values.is_contiguous()
    pointers = layer.keys.data_ptr(), layer.values.data_ptr()
    return Cache(*pointers, layer.key_scale, layer.value_scale, layer.is_fp8)
