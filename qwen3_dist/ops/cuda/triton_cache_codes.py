"""e4m3 codes of the KV cache in Triton, by operations on integers, since cards before Ada and Hopper convert none.

Kernels get the codes as bytes (uint8).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CODE_UNIT = 256.0  # `numbers_of` gives codes' values divided by this


@triton.jit
def codes_of(x):  # type: ignore[no-untyped-def]
    """The nearest codes of fp32 numbers, ties to even; 448, the largest, for what is beyond it. Below 2^-6 codes are
    multiples of 2^-9, which the last bits of a float near 2^14 are too."""
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    usual = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = (size + 16384.0).to(tl.int32, bitcast=True) - (141 << 23)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (tl.where(size < 0.015625, small, usual) | sign).to(tl.uint8)


@triton.jit
def numbers_of(codes):  # type: ignore[no-untyped-def]
    """The values of codes divided by `CODE_UNIT`, in fp16: the bits of a code are those of a half-precision number
    whose exponent has a bias of 7 in place of 15."""
    wide = codes.to(tl.int16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)


def as_bytes(numbers: Tensor) -> Tensor:
    """Keys or values as kernels get them: codes as bytes, others as they are."""
    return numbers.view(torch.uint8) if numbers.dtype == torch.float8_e4m3fn else numbers
