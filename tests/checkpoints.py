"""Tiny HuggingFace checkpoints, written with transformers: the oracle's own files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from qwen3_dist.weights.source import bundled_path

DENSE: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": False,
}
MOE = {"moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}

# Chunks of at most 16 tokens, and a cache that holds two of the longer sequences.
TIGHT: dict[str, Any] = {
    "block_size": 4,
    "num_blocks": 24,
    "max_num_batched_tokens": 16,
    "max_num_seqs": 6,
    "use_tqdm": False,
}


def write_checkpoint(
    path: Path, *, moe: bool, seed: int = 0, max_shard_size: str = "5GB", **overrides: Any
) -> Path:
    """Writes a seeded model whose every weight, norms included, is random; fp32."""
    # Not above: it takes 2 s of CPU time, and ranks import modules of tests too.
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    if moe:
        model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**DENSE, **MOE, **overrides}))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**{**DENSE, **overrides}))
    model.float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15) if parameter.ndim > 1 else parameter.uniform_(0.5, 1.5)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return path


def write_reader(path: Path, ending: str | None = None) -> Path:
    """The bundled model with a tokenizer that knows yes and, if asked to, puts `ending` after a text."""
    shutil.copytree(bundled_path(), path, dirs_exist_ok=True)
    file = path / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokenizer["added_tokens"] = [
        token | {"content": "yes"} if token["content"] == "<|fim_pad|>" else token
        for token in tokenizer["added_tokens"]
    ]
    if ending is not None:
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": ending, "type_id": 0}},
            ],
            "pair": [],
            "special_tokens": {ending: {"id": ending, "ids": [ids[ending]], "tokens": [ending]}},
        }
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    return path
