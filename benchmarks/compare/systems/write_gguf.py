"""Converts a Hugging Face Qwen3 directory to a bf16 `model.gguf` in it: `write_gguf.py MODEL`. Needs gguf and
numpy."""

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


def read(file: Path) -> dict:
    """The bf16 tensors of a safetensors file as views of uint16."""
    size = int(np.fromfile(file, np.uint64, 1)[0])
    header = json.loads(np.fromfile(file, np.uint8, size, offset=8).tobytes())
    data = np.memmap(file, np.uint8, "r", offset=8 + size)
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            tensors[name] = data[start:stop].view(np.uint16).reshape(entry["shape"])
    return tensors


def main(path: str) -> None:
    folder = Path(path)
    config = json.loads((folder / "config.json").read_text())
    tensors = read(folder / "model.safetensors")
    experts = config.get("num_experts", 0)
    writer = gguf.GGUFWriter(folder / "model.tmp", "qwen3moe" if experts else "qwen3")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_tokenizer_model("no_vocab")

    def put(name: str, tensor: np.ndarray) -> None:
        if tensor.ndim == 1:  # norms are kept in fp32
            writer.add_tensor(name, (tensor.astype(np.uint32) << 16).view(np.float32))
        else:
            raw = np.ascontiguousarray(tensor).view(np.uint8)
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)

    put("token_embd.weight", tensors["model.embed_tokens.weight"])
    put("output_norm.weight", tensors["model.norm.weight"])
    if "lm_head.weight" in tensors:
        put("output.weight", tensors["lm_head.weight"])
    for layer in range(config["num_hidden_layers"]):
        theirs, ours = f"model.layers.{layer}.", f"blk.{layer}."
        for name, short in LAYER.items():
            if theirs + name + ".weight" in tensors:
                put(f"{ours}{short}.weight", tensors[f"{theirs}{name}.weight"])
        for name, short in EXPERTS.items():
            parts: list[Any] = [tensors.get(f"{theirs}mlp.experts.{e}.{name}.weight") for e in range(experts)]
            if parts:
                put(f"{ours}{short}.weight", np.stack(parts))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / "model.tmp").rename(folder / "model.gguf")


if __name__ == "__main__":
    main(*sys.argv[1:])
