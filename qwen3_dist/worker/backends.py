"""What a rank was found able to do where it runs, in words."""

from __future__ import annotations

import torch

from qwen3_dist.model.experts import Experts, grouped_mm_works
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.ops.batch import LayerCache
from qwen3_dist.ops.cuda.attention import chosen_attention
from qwen3_dist.ops.kernels import gpu_kernels_for, kernels_for


def chosen_backends(model: Qwen3Model, cache: LayerCache, graphs: bool) -> str:
    """The device and the kernels that this rank's steps use, in one line."""
    device, config = model.device, model.config
    if device.type == "cpu":
        kernels = "C++ kernels" if kernels_for(cache.keys) else "torch alone (no C++ compiler)"
        threads = torch.get_num_threads()
        return f"CPU, {threads} thread{'s' if threads > 1 else ''} a rank: {kernels}"
    _, block_size, groups, dim = cache.keys.shape
    heads = config.n_heads // model.parallel.tp.size
    attention = chosen_attention(device, model.dtype, heads, groups, dim, block_size)
    unused = f" (not {'; not '.join(attention.reasons)})" if attention.reasons else ""
    chosen = [f"attention by {attention.backend.name}{unused}"]
    has_kernels = gpu_kernels_for(model.like) is not None
    chosen.append("rows by Triton kernels" if has_kernels else "rows by torch alone")
    experts = next((module for module in model.modules() if isinstance(module, Experts)), None)
    if experts is not None:
        ways = ["Triton"] if has_kernels else []
        if experts.scales is None and grouped_mm_works(model.like, experts.fc1):
            ways.append("grouped_mm")
        chosen.append(f"experts by {' and '.join(ways) or 'one product after the other'}")
    chosen.append(f"CUDA graphs {'on' if graphs else 'off'}")
    return f"{torch.cuda.get_device_name(device)}: {', '.join(chosen)}"
