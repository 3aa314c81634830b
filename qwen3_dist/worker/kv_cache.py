"""KV-cache memory of one rank: how many blocks fit, and the blocks themselves."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch

from qwen3_dist.errors import ResourceError
from qwen3_dist.model.attention import kv_groups_per_rank
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.ops import host_memory
from qwen3_dist.ops.batch import LayerCache

_HOST_SHARE = 0.3  # of the free host memory, over all ranks of the host
_SHARE_OF_LEFT = 0.9  # of what other processes left free on a card: steps need some beside the cache


def block_bytes(model: Qwen3Model, block_size: int) -> int:
    """Bytes of one block on one rank: K and V of `block_size` tokens in all its layers."""
    return 2 * len(model.blocks) * prod(_block_shape(model, block_size)) * model.dtype.itemsize


def allocate(model: Qwen3Model, num_blocks: int, block_size: int) -> list[LayerCache]:
    """One zeroed `LayerCache` for each of the rank's layers."""
    shape = (num_blocks, *_block_shape(model, block_size))
    return [
        LayerCache(*(host_memory.zeros(shape, model.dtype, model.device) for _ in range(2)))
        for _ in model.blocks
    ]


def free_bytes(
    device: torch.device, gpu_memory_utilization: float, ranks: int, free_at_start: int | None = None
) -> int:
    """Bytes a rank may give to its cache, where `ranks` share the memory. Read it when the weights are loaded.

    On a GPU `ranks` are those on its card, and have `gpu_memory_utilization` of the card in all, or most of
    `free_at_start` where another process left less than that (None: all was free); the last of them to load sees what
    the others took. On a CPU they are those on its host: an even part of 30 % of what the host (or its cgroup) has
    free and other engines' caches will not fill.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        at_start = total if free_at_start is None else free_at_start
        most = max(gpu_memory_utilization, _SHARE_OF_LEFT) * at_start
        return int((min(gpu_memory_utilization * total, most) - (at_start - free)) / ranks)
    free_on_host = max(0, _host_free_bytes() - host_memory.promised_bytes())
    return int(free_on_host * _HOST_SHARE / ranks)


def blocks_that_fit(free: int, per_block: int, most_useful: int) -> int:
    """Blocks of `per_block` bytes in `free` bytes, at most `most_useful`. Raises ResourceError for none."""
    fitting = free // per_block
    if fitting < 1:
        raise ResourceError(
            f"only {max(free, 0) / 2**20:.0f} MiB are left for the KV cache and one block takes "
            f"{per_block / 2**20:.1f} MiB; use more ranks, a smaller dtype, on a GPU a smaller "
            "max_num_batched_tokens, or more memory"
        )
    return min(fitting, most_useful)


def _block_shape(model: Qwen3Model, block_size: int) -> tuple[int, int, int]:
    config = model.config
    return block_size, kv_groups_per_rank(config.n_kv_groups, model.parallel.tp.size), config.head_dim


def _host_free_bytes() -> int:
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except OSError:
        return available
    return available if limit == "max" else min(available, int(limit) - used)
