"""KV-cache memory of one rank: how many blocks fit, and the blocks themselves."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch
from torch import Tensor

from qwen3_dist.errors import ResourceError
from qwen3_dist.model.attention import kv_groups_per_rank
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.ops import host_memory
from qwen3_dist.ops.batch import LayerCache
from qwen3_dist.ops.kv_codes import CODES

_HOST_SHARE = 0.3  # share of the free host memory for the caches of all ranks of the host
_SHARE_OF_LEFT = 0.9  # share of a card's free memory, if other processes use the card; steps need the rest


def block_bytes(model: Qwen3Model, block_size: int) -> int:
    """Bytes of one block on one rank: K and V of `block_size` tokens in all layers of the rank."""
    return 2 * len(model.blocks) * prod(_block_shape(model, block_size)) * model.cache_dtype.itemsize


def allocate(model: Qwen3Model, num_blocks: int, block_size: int) -> list[LayerCache]:
    """Allocates one zeroed `LayerCache` for each layer of the rank."""
    shape = (num_blocks, *_block_shape(model, block_size))

    def zeros() -> Tensor:
        return host_memory.zeros(shape, model.cache_dtype, model.device)

    scales = ((block.att.key_scale, block.att.value_scale) for block in model.blocks)
    fp8 = model.cache_dtype == CODES
    return [LayerCache(zeros(), zeros(), *(each if fp8 else ())) for each in scales]


def free_bytes(
    device: torch.device, gpu_memory_utilization: float, ranks: int, free_at_start: int | None = None
) -> int:
    """Bytes that a rank may use for its KV cache. Call it after the weights are loaded.

    On a GPU, `ranks` ranks share the card. Together they use `gpu_memory_utilization` of it, or 90% of `free_at_start`
    if other processes use the card and this is less (None: all of the card was free).
    On a CPU, `ranks` ranks share the host. Together they use 30% of the memory that the host or its cgroup has free,
    not counting memory that other engines have reserved but not touched yet.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        at_start = total if free_at_start is None else free_at_start
        most = max(gpu_memory_utilization, _SHARE_OF_LEFT) * at_start
        return int((min(gpu_memory_utilization * total, most) - (at_start - free)) / ranks)
    free_on_host = max(0, _host_free_bytes() - host_memory.promised_bytes())
    return int(free_on_host * _HOST_SHARE / ranks)


def blocks_that_fit(free: int, per_block: int, most_useful: int) -> int:
    """The number of blocks of `per_block` bytes in `free` bytes, at most `most_useful`.

    Raises ResourceError if not even one fits."""
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
