"""Loads a rank's part of the model and computes how many KV-cache blocks fit beside it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from qwen3_dist.config import ModelConfig
from qwen3_dist.expert_placement import Placements
from qwen3_dist.kv_cache_dtype import FP8_CACHE
from qwen3_dist.machine import cores
from qwen3_dist.model.attention import kv_groups_per_rank
from qwen3_dist.model.finalize import finalize
from qwen3_dist.model.step_memory import step_bytes
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.ops.choose import AttentionShape, choose_ops, deterministic_ops
from qwen3_dist.ops.kv_codes import CODES
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.parallel.expert_exchange import uses_all_to_all
from qwen3_dist.protocol.messages import Progress
from qwen3_dist.protocol.step_limits import SchedulerLimits
from qwen3_dist.settings import EngineConfig
from qwen3_dist.weights.files import CheckpointFiles
from qwen3_dist.weights.kv_scales import read_kv_scales
from qwen3_dist.weights.loader import load_model
from qwen3_dist.weights.lora_loader import load_adapters
from qwen3_dist.weights.version_files import directory_of, require_unchanged
from qwen3_dist.worker import kv_cache


@dataclass(frozen=True)
class MemoryShare:
    """How a rank shares its device's memory: `ranks` ranks share the host or, on a GPU, the card. `free_at_start`
    bytes of the card were free before any of them loaded (None: all of it)."""

    ranks: int = 1
    free_at_start: int | None = None


def torch_dtypes(config: EngineConfig, model_config: ModelConfig) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of activations and of the KV cache."""
    compute, kept = config.compute_dtype(model_config), config.cache_dtype(model_config)
    return getattr(torch, compute), CODES if kept == FP8_CACHE else getattr(torch, kept)


def set_threads(config: EngineConfig, ranks_on_host: int) -> None:
    """Sets torch's threads to `threads_per_rank` or, by default, to an even share of the host's cores.

    The share is among `ranks_on_host` ranks of this engine, or `ranks_per_host` if that is more because of other
    engines. It must always be set: Ray makes OpenMP use one core only.
    """
    share = max(1, cores() // max(ranks_on_host, config.ranks_per_host or 1))
    torch.set_num_threads(config.threads_per_rank or share)


def load_shard(
    config: EngineConfig,
    path: Path,
    placements: Placements,
    parallel: ParallelContext,
    device: torch.device,
    progress: Progress | None,
) -> Qwen3Model:
    """Loads this rank's part of the checkpoint at `path`, or of what `config` has in place of its weights, with
    experts placed by `placements`, and finalizes it."""
    model_config = ModelConfig.from_directory(path, config.hf_overrides).rounded(config.quantize)
    (dtype, kept), random = torch_dtypes(config, model_config), config.has_random_weights
    tp = parallel.tp.size
    groups = kv_groups_per_rank(model_config.n_kv_groups, tp)
    sizes = (model_config.n_heads // tp, groups, model_config.head_dim, config.block_size)
    attention = AttentionShape(*sizes, kept)
    ops = deterministic_ops(device, dtype) if parallel.deterministic else choose_ops(device, dtype, attention)
    require_unchanged(config.weights)
    files = directory_of(config.weights, path)
    model = load_model(files, model_config, parallel, dtype, device, progress, random, placements, ops)
    model.weights, model.kv_cache_dtype = config.weights, kept
    if kept == CODES and model_config.quantization is not None and not random:
        read_kv_scales(model, CheckpointFiles(files))
    finalize(model, int8=config.quantize == "int8")
    load_adapters(config.lora, model)
    return model


def count_blocks(config: EngineConfig, model: Qwen3Model, share: MemoryShare) -> int:
    """KV-cache blocks this rank can hold beside its weights, from the settings or from free memory."""
    if config.num_blocks is not None:
        return config.num_blocks
    device = model.device
    if config.kv_cache_gib is not None and device.type == "cpu":
        free = int(config.kv_cache_gib * 2**30)
    else:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what loading or regrouping left in torch's allocator would count as used
        free = kv_cache.free_bytes(device, config.gpu_memory_utilization, share.ranks, share.free_at_start)
    per_block = kv_cache.block_bytes(model, config.block_size)
    longest = min(config.max_model_len or model.config.context_length, model.config.context_length)
    limits = SchedulerLimits.of(config, device.type, num_blocks=free // per_block)
    most_useful = limits.max_num_seqs * -(-longest // config.block_size)
    if device.type == "cuda":  # a CPU has room: caches take less than a third of its memory
        free -= _step_bytes(config, model, limits)
    return kv_cache.blocks_that_fit(free, per_block, most_useful)


def _step_bytes(config: EngineConfig, model: Qwen3Model, limits: SchedulerLimits) -> int:
    tokens = limits.max_step_tokens
    layout = model.parallel.layout
    quantization = model.config.quantization
    widens = config.quantize == "int8" or (quantization is not None and quantization.has_int8)
    by_all_to_all = uses_all_to_all(config, layout, model.config, tokens * layout.dp, model.device.type)
    return step_bytes(
        model.config,
        layout,
        tokens,
        limits.max_samples,
        model.dtype.itemsize,
        by_all_to_all,
        widens,
        model.parallel.deterministic,
        bool(config.lora.pairs),
    )


def held_bytes(device: torch.device) -> int:
    """Memory that this rank holds: what torch has reserved of its GPU, or else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 0
