"""The plain, unsharded Qwen3 without cache, batch or communication: the oracle for tests of the sharded model.

It follows the reference architecture line by line and shares no layer code with `transformer.py`, so that an error in
one does not hide in the other. Legend: T tokens of one sequence, D emb_dim, V vocab_size,
H heads, G KV groups, d head_dim.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qwen3_dist.config import ModelConfig
from qwen3_dist.weights.files import shard_files


class RMSNorm(nn.Module):
    def __init__(self, config: ModelConfig, dim: int) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.qwen3_compatible = config.qwen3_compatible
        self.scale = nn.Parameter(torch.ones(dim))
        self.shift = nn.Parameter(torch.zeros(dim)) if config.rms_norm_shift else None

    def forward(self, x: Tensor) -> Tensor:
        input_dtype = x.dtype
        if self.qwen3_compatible:
            x = x.to(torch.float32)
        variance = x.pow(2).mean(dim=-1, keepdim=True)
        x = (x * torch.rsqrt(variance + self.eps)).to(input_dtype) * self.scale
        return x if self.shift is None else x + self.shift


class GroupedQueryAttention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.window = config, config.window_of_layer(layer)
        d, bias = config.head_dim, config.attention_bias
        self.W_query = nn.Linear(config.emb_dim, config.n_heads * d, bias=bias)
        self.W_key = nn.Linear(config.emb_dim, config.n_kv_groups * d, bias=bias)
        self.W_value = nn.Linear(config.emb_dim, config.n_kv_groups * d, bias=bias)
        self.out_proj = nn.Linear(config.n_heads * d, config.emb_dim, bias=bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(config, d), RMSNorm(config, d)

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        tokens, d = x.shape[0], self.config.head_dim
        q = self.W_query(x).view(tokens, -1, d).transpose(0, 1)
        k = self.W_key(x).view(tokens, -1, d).transpose(0, 1)
        v = self.W_value(x).view(tokens, -1, d).transpose(0, 1)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        repeats = self.config.n_heads // self.config.n_kv_groups
        k, v = k.repeat_interleave(repeats, dim=0), v.repeat_interleave(repeats, dim=0)
        if self.window is not None:
            mask = mask | mask.new_ones(tokens, tokens).tril(-self.window)
        scores = (q @ k.transpose(1, 2) * d**-0.5).masked_fill(mask, -torch.inf)
        attended = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v
        return self.out_proj(attended.transpose(0, 1).reshape(tokens, -1))


class FeedForward(nn.Module):
    def __init__(self, emb_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(emb_dim, hidden_dim, bias=False)
        self.fc2 = nn.Linear(emb_dim, hidden_dim, bias=False)
        self.fc3 = nn.Linear(hidden_dim, emb_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(nn.functional.silu(self.fc1(x)) * self.fc2(x))


class MoEFeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.emb_dim, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            FeedForward(config.emb_dim, config.moe_hidden_dim) for _ in range(config.num_experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        probabilities = torch.softmax(self.gate(x), dim=-1, dtype=torch.float32)
        weights, chosen = probabilities.topk(self.config.num_experts_per_tok, dim=-1)
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        weights = weights.to(x.dtype)
        out = torch.zeros_like(x)
        for expert_id, expert in enumerate(self.experts):
            token, choice = (chosen == expert_id).nonzero(as_tuple=True)
            out.index_add_(0, token, expert(x[token]) * weights[token, choice, None])
        return out


class TransformerBlock(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config, config.emb_dim)
        self.att = GroupedQueryAttention(config, layer)
        self.norm2 = RMSNorm(config, config.emb_dim)
        self.ff: nn.Module = FeedForward(config.emb_dim, config.hidden_dim)
        if config.is_moe_layer(layer):
            self.ff = MoEFeedForward(config)

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.att(self.norm1(x), mask, cos, sin)
        return x + self.ff(self.norm2(x))


class ReferenceModel(nn.Module):
    """Token ids [T] of one sequence -> logits [T, V]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        self.blocks = nn.ModuleList(TransformerBlock(config, layer) for layer in range(config.n_layers))
        self.final_norm = RMSNorm(config, config.emb_dim)
        self.out_head = nn.Linear(config.emb_dim, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.out_head.weight = self.tok_emb.weight

    @torch.inference_mode()
    def forward(self, token_ids: Tensor) -> Tensor:
        tokens = token_ids.shape[0]
        x = self.tok_emb(token_ids)
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
        cos, sin = rotation(self.config, tokens)
        cos, sin = cos.to(x), sin.to(x)
        for block in self.blocks:
            x = block(x, mask, cos, sin)
        return self.out_head(self.final_norm(x))

    @torch.inference_mode()
    def generate_greedy(self, prompt: list[int], max_tokens: int) -> list[int]:
        """Generates `max_tokens` tokens greedily, with a full forward pass for each."""
        ids = list(prompt)
        for _ in range(max_tokens):
            ids.append(int(self(torch.tensor(ids, device=self.tok_emb.weight.device))[-1].argmax()))
        return ids[len(prompt) :]


def rotation(config: ModelConfig, tokens: int) -> tuple[Tensor, Tensor]:
    """cos and sin [T, d] in fp32 (RoPE, arXiv 2104.09864; YaRN, arXiv 2309.00071, eq. 17 to 23)."""
    d, base, yarn = config.head_dim, config.rope_base, config.rope_scaling
    frequencies = []
    for i in range(d // 2):
        theta = base ** (-2 * i / d)
        if yarn is not None:

            def turns_at(rotations: float, length: int = yarn.original_context_length) -> float:
                return d * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

            low, high = turns_at(yarn.beta_fast), turns_at(yarn.beta_slow)
            if yarn.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, d - 1)
            ramp = min(max((i - low) / (high - low or 0.001), 0.0), 1.0)
            theta = theta / yarn.factor * ramp + theta * (1 - ramp)
        frequencies.append(theta)
    angles = torch.arange(tokens).float()[:, None] * torch.tensor(frequencies * 2)
    scale = yarn.mscale if yarn is not None else 1.0
    return angles.cos() * scale, angles.sin() * scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


# Checkpoint name -> ours, by substring replacement in this order.
_NAMES = {
    "model.embed_tokens.": "tok_emb.",
    "model.norm.weight": "final_norm.scale",
    "model.norm.bias": "final_norm.shift",
    "model.layers.": "blocks.",
    "lm_head.": "out_head.",
    "input_layernorm.weight": "norm1.scale",
    "input_layernorm.bias": "norm1.shift",
    "post_attention_layernorm.weight": "norm2.scale",
    "post_attention_layernorm.bias": "norm2.shift",
    "self_attn.q_norm.weight": "att.q_norm.scale",
    "self_attn.q_norm.bias": "att.q_norm.shift",
    "self_attn.k_norm.weight": "att.k_norm.scale",
    "self_attn.k_norm.bias": "att.k_norm.shift",
    "self_attn.q_proj.": "att.W_query.",
    "self_attn.k_proj.": "att.W_key.",
    "self_attn.v_proj.": "att.W_value.",
    "self_attn.o_proj.": "att.out_proj.",
    "mlp.": "ff.",
    "gate_proj.": "fc1.",
    "up_proj.": "fc2.",
    "down_proj.": "fc3.",
}


def load_reference(path: str | Path, dtype: torch.dtype = torch.float32) -> ReferenceModel:
    """Reads a whole HuggingFace checkpoint directory into a `ReferenceModel`."""
    config = ModelConfig.from_directory(path)
    model = ReferenceModel(config).to(dtype).eval()
    state: dict[str, Tensor] = {}
    for file, wanted in shard_files(Path(path)).items():
        for name, tensor in load_file(file).items():
            if wanted is None or name in wanted:
                state.update(_rename(name, tensor))
    if config.tie_word_embeddings:
        state["out_head.weight"] = state["tok_emb.weight"]
    model.load_state_dict(state)
    return model


def _rename(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name.endswith("experts.gate_up_proj"):
        prefix = name.replace("model.layers.", "blocks.").replace("mlp.experts.gate_up_proj", "ff.experts")
        gates, ups = tensor.chunk(2, dim=1)
        pairs = (("fc1", gates), ("fc2", ups))
        return {f"{prefix}.{i}.{fc}.weight": w[i] for fc, w in pairs for i in range(len(tensor))}
    if name.endswith("experts.down_proj"):
        prefix = name.replace("model.layers.", "blocks.").replace("mlp.experts.down_proj", "ff.experts")
        return {f"{prefix}.{i}.fc3.weight": tensor[i] for i in range(len(tensor))}
    for theirs, ours in _NAMES.items():
        name = name.replace(theirs, ours)
    return {name: tensor}
