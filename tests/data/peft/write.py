"""Writes the adapters in this folder with PEFT, and the log-probabilities that PEFT's model gives with each of them.

Run once, with peft 0.21.2: `python -m tests.data.peft.write`. Tests read the files and do not need PEFT.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
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
# Adapters that can be used: PEFT's arguments for the dense model.
USED: dict[str, dict[str, Any]] = {
    "rslora": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "all_linear": {"target_modules": "all-linear"},
    "patterns": PATTERNS,
}
# Adapters that are refused, with whether the model has experts.
REFUSED: dict[str, tuple[bool, dict[str, Any]]] = {
    "saved": (False, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "parameters": (True, {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    "moe_all_linear": (True, {"target_modules": "all-linear"}),
}


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
    from peft import LoraConfig, get_peft_model

    expected = {}
    for name, (moe, given) in {**{name: (False, given) for name, given in USED.items()}, **REFUSED}.items():
        config = LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **given)
        model = get_peft_model(base(moe), config)
        fill((name, each) for name, each in model.named_parameters() if ".lora_" in name)
        model.save_pretrained(FOLDER / name)
        (FOLDER / name / "README.md").unlink()
        if name in USED:
            with torch.no_grad():
                logits = model.eval()(torch.tensor([PROMPT])).logits[0]
            chosen = logits.log_softmax(-1)[range(len(PROMPT) - 1), PROMPT[1:]]
            expected[name] = [round(float(each), 6) for each in chosen]
    (FOLDER / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    print(expected, file=sys.stderr)


if __name__ == "__main__":
    main()
