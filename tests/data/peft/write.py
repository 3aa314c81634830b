"""Writes the adapters in this folder with PEFT, and the log-probabilities that PEFT's model gives with each of them.

Run once, with peft 0.21.2: `python -m tests.data.peft.write`, and for SWAPPED with peft 0.18.1:
`python -m tests.data.peft.write swapped`. Tests read the files and do not need PEFT.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

FOLDER = Path(__file__).parent
PROMPT = [3, 1, 50, 42, 7, 7, 9, 12]
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "tie_word_embeddings": False,
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
PATTERNS = {
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "rank_pattern": {"v_proj": 3, r"layers\.1\.mlp\.down_proj": 1},
    "alpha_pattern": {"q_proj": 1.5, r"layers\.1\.mlp\..*": 6},
}
STACKED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# Adapters that can be used: PEFT's arguments for the dense model, and for the one with experts.
OF_DENSE: dict[str, dict[str, Any]] = {
    "rslora": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "all_linear": {"target_modules": "all-linear"},
    "patterns": PATTERNS,
}
OF_EXPERTS: dict[str, dict[str, Any]] = {
    "parameters": {"target_parameters": STACKED},
    "moe_all_linear": {"target_modules": "all-linear"},
    "gate_up": {"target_parameters": STACKED[:1], "target_modules": ["q_proj"], "use_rslora": True},
    "down": {
        "target_parameters": STACKED[1:],
        "rank_pattern": {r"layers\.1\.mlp\.experts\.down_proj": 3},
        "alpha_pattern": {r"layers\.0\..*": 9},
    },
    "router": {"target_parameters": ["mlp.gate.weight", *STACKED], "rank_pattern": {"gate.weight": 1}},
    "saved_router": {"target_modules": ["v_proj"], "modules_to_save": ["gate"]},
}
# Each projection of each expert has a pair, as PEFT wrote it for transformers 4. It reads
# this, and writes it no more. (With use_rslora, PEFT 0.21.2 reads it with another scale of gate and up: it doubles
# alpha and rank to join them, which keeps alpha / r alone.)
SINGLE: dict[str, dict[str, Any]] = {
    "single": {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
}
SWAPPED: dict[str, dict[str, Any]] = {"swapped": {"target_parameters": STACKED, "target_modules": ["k_proj"]}}
USED = {
    name: moe
    for moe, names in ((False, OF_DENSE), (True, {**OF_EXPERTS, **SINGLE, **SWAPPED}))
    for name in names
}
# Adapters that are refused.
REFUSED: dict[str, dict[str, Any]] = {"saved": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}}


def base(moe: bool) -> Any:
    """A model whose weights follow from their places alone, fp32."""
    model: Any = (
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE)) if moe else Qwen3ForCausalLM(Qwen3Config(**SHAPE))
    )
    fill(model.named_parameters())
    return model.float().eval()


@torch.no_grad()
def fill(parameters: Any) -> None:
    for number, (_, parameter) in enumerate(sorted(parameters)):
        values = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 1.7 + number)
        parameter.copy_((0.2 * values + (parameter.ndim == 1)).view(parameter.shape))


def main() -> None:
    if sys.argv[1:] == ["swapped"]:
        expected = json.loads((FOLDER / "expected.json").read_text())
        expected |= {name: write(name, True, given) for name, given in SWAPPED.items()}
    else:
        expected = {name: write(name, False, given) for name, given in OF_DENSE.items()}
        expected |= {name: write(name, True, given) for name, given in OF_EXPERTS.items()}
        expected |= {name: write_single(name, given) for name, given in SINGLE.items()}
        for name, given in REFUSED.items():
            write(name, False, given)
    (FOLDER / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    print(expected, file=sys.stderr)


def write(name: str, moe: bool, given: dict[str, Any]) -> list[float]:
    """Writes an adapter with PEFT, and returns the log-probabilities of its model."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **given)
    model = get_peft_model(base(moe), config)
    changed = (".lora_", "modules_to_save")
    fill((each, weight) for each, weight in model.named_parameters() if any(part in each for part in changed))
    model.save_pretrained(FOLDER / name)
    (FOLDER / name / "README.md").unlink()
    return logprobs(model)


def write_single(name: str, given: dict[str, Any]) -> list[float]:
    """Writes an adapter with a pair for each projection of each expert, and returns what PEFT's model gives that reads
    it."""
    from peft import LoraConfig, PeftModel

    inner, emb_dim, experts = (SHAPE[key] for key in ("moe_intermediate_size", "hidden_size", "num_experts"))
    sizes = {"gate_proj": (emb_dim, inner), "up_proj": (emb_dim, inner), "down_proj": (inner, emb_dim)}
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(SHAPE["num_hidden_layers"]):
        shapes = {
            f"mlp.experts.{expert}.{projection}": size
            for expert in range(experts)
            for projection, size in sizes.items()
        }
        if "q_proj" in given["target_modules"]:
            shapes["self_attn.q_proj"] = (emb_dim, emb_dim)
        for module, (inputs, outputs) in shapes.items():
            tensors[f"base_model.model.model.layers.{layer}.{module}.lora_A.weight"] = torch.empty(2, inputs)
            tensors[f"base_model.model.model.layers.{layer}.{module}.lora_B.weight"] = torch.empty(outputs, 2)
    fill(tensors.items())
    folder = FOLDER / name
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", inference_mode=True, **given).save_pretrained(folder)
    return logprobs(PeftModel.from_pretrained(base(True), folder))


@torch.no_grad()
def logprobs(model: Any) -> list[float]:
    logits = model.eval()(torch.tensor([PROMPT])).logits[0]
    chosen = logits.log_softmax(-1)[range(len(PROMPT) - 1), PROMPT[1:]]
    return [round(float(each), 6) for each in chosen]


if __name__ == "__main__":
    main()
