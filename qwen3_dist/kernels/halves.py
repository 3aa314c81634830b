"""The halves of a transformer block, each as one call of a kernel: Python between their parts would take as long
as the parts do for few tokens.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from qwen3_dist.kernels.native import Kernels


class Half:
    """One half on one rank; `members` are those of its structure in `cpu/halves.h`, in their order.

    It holds their addresses: whoever makes it keeps the tensors, and keeps them where they are.
    """

    def __init__(self, kernels: Kernels, *members: Tensor | int | None, eps: float, is_int8: bool) -> None:
        words = [member.data_ptr() if isinstance(member, Tensor) else member or 0 for member in members]
        self._words = (ctypes.c_long * len(words))(*words)
        self._address = ctypes.addressof(self._words)
        self._kernels = kernels
        self._eps = eps
        self._ending = "_int8" if is_int8 else ""

    def attention(
        self,
        x: Tensor,
        cache: tuple[Tensor, Tensor],
        rope: tuple[Tensor, Tensor],
        where: tuple[Tensor, Tensor, Tensor, Tensor],
    ) -> Tensor:
        """norm, q, k, v, rotation, attention and the projection back, for x [T, D] -> [T, D].

        `where` is slots, tables, context_lens and starts, as `Kernels.rotate` and `attention` have them.
        """
        (slots, tables, _, _), (keys, _) = where, cache
        sizes = (len(slots), *tables.shape[:1], keys.shape[1], tables.shape[1])
        return self._call("attention_half", x, *cache, *rope, *where, *sizes)

    def feed_forward(self, x: Tensor) -> Tensor:
        """norm and the dense SwiGLU, for x [T, D] -> [T, D]."""
        return self._call("feed_forward_half", x, x.shape[0])

    def experts(self, x: Tensor) -> Tensor:
        """norm, routing and this rank's part of the experts, for x [T, D] -> [T, D]."""
        return self._call("experts_half", x, x.shape[0])

    def _call(self, name: str, x: Tensor, *others: Tensor | int) -> Tensor:
        out = torch.empty_like(x)
        self._kernels.run(name + self._ending, self._address, x, out, *others, self._eps)
        return out
