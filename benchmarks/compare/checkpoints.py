"""Checkpoints with real shapes and random weights, as Hugging Face directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qwen3_dist.config import ModelConfig
from qwen3_dist.layout import Layout
from qwen3_dist.weights import random_weights
from qwen3_dist.weights.weight_plan import WeightPlan

_COMMON: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "torch_dtype": "bfloat16",
}
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {  # Qwen3-0.6B
        **_COMMON,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "moe": {
        **_COMMON,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": 16,
        "num_key_value_heads": 4,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 384,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
    },
}


def write_checkpoint(shape: dict[str, Any], folder: Path) -> Path:
    """Writes a bf16 checkpoint of `shape` to `folder` unless it exists. Returns `folder`."""
    config_file = folder / "config.json"
    if config_file.exists() and json.loads(config_file.read_text()) == shape:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = ModelConfig.from_dict(shape)
    tensors: dict[str, Tensor] = {}
    for piece in WeightPlan(config, Layout(), set()).pieces(Layout().coords(0)):
        tensors[piece.source] = torch.empty(piece.shape, dtype=torch.bfloat16)
        random_weights.fill(piece, tensors[piece.source])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config_file.write_text(json.dumps(shape, indent=1))  # last, since it marks the checkpoint as complete
    return folder
