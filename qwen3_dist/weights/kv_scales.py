"""Reads the scales of the keys and values of an fp8 KV cache, where a checkpoint has them."""

from __future__ import annotations

from math import isfinite

from qwen3_dist.errors import CheckpointError
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.weights.files import CheckpointFiles

# After "model.layers.N.self_attn.": compressed-tensors, ModelOpt, and the older ones of both.
_KEYS = ("k_scale", "k_proj.k_scale", "attn.k_scale", "k_proj.output_scale", "kv_scale")
_VALUES = ("v_scale", "v_proj.v_scale", "attn.v_scale", "v_proj.output_scale", "kv_scale")


def read_kv_scales(model: Qwen3Model, files: CheckpointFiles) -> None:
    """Gives the attention of each block its scales; those that the checkpoint lacks stay 1.

    Of scales for each head a layer takes the largest, with which no head's keys are too large. Raises CheckpointError
    for a scale that is not positive, or no floating-point number.
    """
    names = files.names()
    for block in model.blocks:
        for attribute, ends in (("key_scale", _KEYS), ("value_scale", _VALUES)):
            found = (f"model.layers.{block.layer}.self_attn.{end}" for end in ends)
            name = next((each for each in found if each in names), None)
            if name is not None:
                setattr(block.att, attribute, _largest(files, name))


def _largest(files: CheckpointFiles, name: str) -> float:
    files.dtype(name)
    scale = files.read_whole(name).float()
    if not scale.numel() or not all(isfinite(each) and each > 0 for each in scale.flatten().tolist()):
        raise CheckpointError(
            f"{name} has a scale that is not positive; set kv_cache_dtype=bfloat16, or correct it"
        )
    return float(scale.max())
