"""LoRA adapters in PEFT's format, and checkpoints into which they are merged: the oracle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERYTHING = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def write_adapter(
    path: Path,
    base: Path,
    targets: tuple[str, ...] = EVERYTHING,
    r: int = 4,
    seed: int = 0,
    strength: float = 0.15,
    experts: bool = False,
    **config: Any,
) -> Path:
    """A seeded adapter for the `targets` in the checkpoint `base`, of experts only if `experts`; fp32.

    A parameter of `strength` is its standard deviation.
    """
    path.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, weight in sorted(load_file(base / "model.safetensors").items()):
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in targets and (experts or ".experts." not in name):
            outputs, inputs = weight.shape
            tensors[f"base_model.model.{module}.lora_A.weight"] = strength * torch.randn(r, inputs)
            tensors[f"base_model.model.{module}.lora_B.weight"] = strength * torch.randn(outputs, r)
    save_file(tensors, path / "adapter_model.safetensors")
    written = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": list(targets)} | config
    (path / "adapter_config.json").write_text(json.dumps({"bias": "none", "use_dora": False, **written}))
    return path


def merge(path: Path, base: Path, adapter: Path) -> Path:
    """Writes the checkpoint `base` with the adapter added to its weights."""
    shutil.copytree(base, path, dirs_exist_ok=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    weights, pairs = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name, a in pairs.items():
        module, _, which = name.removeprefix("base_model.model.").rpartition(".lora_")
        if which == "A.weight":
            weight = weights[f"{module}.weight"]
            change = pairs[name.replace("lora_A", "lora_B")].double() @ a.double()
            weights[f"{module}.weight"] = (weight.double() + scale * change).to(weight.dtype)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path
