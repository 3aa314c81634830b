"""The memory that a rank gives up while its engine sleeps: that of the KV cache, and of the weights.

On a GPU the weights are copied to host memory, or dropped at level 2. On a CPU they are in host memory already: they
stay, or their pages are given back to the kernel at level 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen3_dist.model.finalize import tensors_beside_blocks, tensors_of_block
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.ops.batch import LayerCache
from qwen3_dist.ops.host_memory import give_back

_PIECE_BYTES = 64 << 20  # a power of 2: torch rounds each allocation of pinned memory up to one


class SleepingMemory:
    """What was given up since the constructor, which does it, until `wake`. No step may run meanwhile."""

    def __init__(self, model: Qwen3Model, cache: Sequence[LayerCache], level: int) -> None:
        weights = [
            *tensors_beside_blocks(model),
            *(t for block in model.blocks for t in tensors_of_block(block)),
        ]
        self._cache = _storages([tensor for layer in cache for tensor in (layer.keys, layer.values)])
        self._weights = _storages(weights)
        self._on_gpu = model.device.type == "cuda"
        self._kept: list[list[Tensor]] = []  # on the host, the pieces of each storage of weights
        if level == 2:
            model.weights = None
        elif self._on_gpu:
            self._kept = [_on_host(each) for each in self._weights]
        self._sizes = [each.untyped_storage().nbytes() for each in (*self._cache, *self._weights)]
        if self._on_gpu:
            self._free()
            return
        for each in self._cache if level == 1 else (*self._cache, *self._weights):
            give_back(each)

    def _free(self) -> None:
        for each in (*self._cache, *self._weights):
            each.untyped_storage().resize_(0)
        torch.cuda.empty_cache()

    def wake(self) -> str:
        """Takes the memory again. The KV cache is zeroed; at level 2 weights are of no use until they are loaded.
        Returns what lacks if the card has too little, and then changes nothing."""
        if not self._on_gpu:
            return ""  # the kernel gives pages as they are used
        try:
            for each, size in zip((*self._cache, *self._weights), self._sizes, strict=True):
                each.untyped_storage().resize_(size)
        except torch.OutOfMemoryError:
            self._free()
            needed, (free, _) = sum(self._sizes), torch.cuda.mem_get_info(self._cache[0].device)
            return (
                f"it needs {needed / 2**30:.2f} GiB of its card, which has {free / 2**30:.2f} GiB free; free "
                f"{max(0, needed - free) / 2**30:.2f} GiB more and wake it again"
            )
        for each in self._cache:
            each.zero_()
        for each, kept in zip(self._weights, self._kept, strict=False):
            for piece, on_host in zip(_bytes_of(each).split(_PIECE_BYTES), kept, strict=True):
                piece.copy_(on_host, non_blocking=True)
        torch.cuda.synchronize()
        self._kept = []
        return ""


def _storages(tensors: Sequence[Tensor]) -> list[Tensor]:
    """One tensor for each storage."""
    return list({tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}.values())


def _bytes_of(tensor: Tensor) -> Tensor:
    """The whole storage of a tensor, as uint8."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _on_host(tensor: Tensor) -> list[Tensor]:
    pieces = _bytes_of(tensor).split(_PIECE_BYTES)
    return [torch.empty(piece.shape, dtype=torch.uint8, pin_memory=True).copy_(piece) for piece in pieces]
