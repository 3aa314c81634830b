"""The halves of a transformer block, each as one call of a kernel, and all blocks as one: Python between their parts
would take as long as the parts do for few tokens, since they leave the caches full of weights.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from qwen3_dist.ops.cpu.native import Kernels

Where = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Half:
    """One half on one rank; `members` are those of its structure in `cpu/halves.h`, in their order.

    It holds their addresses: whoever makes it keeps the tensors, and keeps them where they are.
    """

    def __init__(self, kernels: Kernels, *members: Tensor | int | None, eps: float, is_int8: bool) -> None:
        words = [member.data_ptr() if isinstance(member, Tensor) else member or 0 for member in members]
        self._words = (ctypes.c_long * len(words))(*words)
        self.address = ctypes.addressof(self._words)
        self._kernels = kernels
        self.eps = eps
        self.ending = "_int8" if is_int8 else ""

    def attention(
        self,
        x: Tensor,
        cache: tuple[Tensor, Tensor],
        rope: tuple[Tensor, Tensor],
        where: Where,
    ) -> Tensor:
        """norm, q, k, v, rotation, attention and the projection back, for x [T, D] -> [T, D].

        `where` is slots, tables, table_rows, context_lens and starts, as `Kernels.rotate` and `attention` have them.
        """
        return self._call("attention_half", x, *cache, *rope, *where, *_sizes(where, cache[0]))

    def feed_forward(self, x: Tensor) -> Tensor:
        """norm and the dense SwiGLU, for x [T, D] -> [T, D]."""
        return self._call("feed_forward_half", x, x.shape[0])

    def experts(self, x: Tensor) -> Tensor:
        """norm, routing and this rank's part of the experts, for x [T, D] -> [T, D]."""
        return self._call("experts_half", x, x.shape[0])

    def _call(self, name: str, x: Tensor, *others: Tensor | int) -> Tensor:
        out = torch.empty_like(x)
        self._kernels.run(name + self.ending, self.address, x, out, *others, self.eps)
        return out


class Blocks:
    """Blocks one after the other with their residuals: of each, the half with attention, the other, and whether that
    is a mixture of experts. Where the last is the model's, its `head` may follow."""

    def __init__(
        self, kernels: Kernels, halves: Sequence[tuple[Half, Half, bool]], head: Half | None = None
    ) -> None:
        words: list[int] = []
        for attention, other, is_mixture in halves:
            words += (
                (attention.address, 0, other.address) if is_mixture else (attention.address, other.address, 0)
            )
        self._words = (ctypes.c_long * len(words))(*words)
        self._halves = halves  # whose addresses these are
        self._kernels = kernels
        self.head = head
        self._name, self._eps = f"blocks{halves[0][0].ending}", halves[0][0].eps

    def run(
        self,
        x: Tensor,
        caches: Sequence[tuple[Tensor, Tensor]],
        rope: tuple[Tensor, Tensor],
        where: Where,
        logits: tuple[Tensor, Tensor] | None,
        group: int,
        operation: int,
    ) -> int:
        """x [T, D] becomes what the last block makes of it. `logits` are some of its rows [L] and what the head makes
        of them [L, outputs], which is written.

        `where` is as for a half, `group` the address of the group that adds partial sums up, 0 for a rank alone, and
        `operation` the number of its last operation.

        Returns the number after its own, or -1 if the group has lost a rank.
        """
        addresses = [tensor.data_ptr() for cache in caches for tensor in cache]
        words = (ctypes.c_long * len(addresses))(*addresses)
        blocks, held = ctypes.addressof(self._words), ctypes.addressof(words)
        sizes = _sizes(where, caches[0][0])
        asked = None
        if logits is not None and self.head is not None:
            rows, out = logits
            asked = (ctypes.c_long * 4)(self.head.address, rows.data_ptr(), len(rows), out.data_ptr())
        settings = (*sizes, ctypes.addressof(asked) if asked else None, self._eps, group, operation)
        done: int = self._kernels.run(
            self._name, blocks, len(self._halves), x, held, *rope, *where, *settings
        )
        return done


def _sizes(where: Where, keys: Tensor) -> tuple[int, int, int, int]:
    """Tokens, sequences, block size, blocks of a table."""
    slots, tables, _, context_lens, _ = where
    return (len(slots), len(context_lens), keys.shape[1], tables.shape[1])
