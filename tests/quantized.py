"""Quantised checkpoints beside the same model in fp32, written from the formula of each format's documentation.

FP8 by blocks (DeepSeek-V3, transformers' `FineGrainedFP8Config`): weight = e4m3 code * `weight_scale_inv` of its block
of `weight_block_size` outputs and inputs, where the last blocks may be cut. `test_quantized.py` compares this writer
with transformers' own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoints import write_checkpoint

Tensors = dict[str, Tensor]
LARGEST = torch.finfo(torch.float8_e4m3fn).max


class Twins(NamedTuple):
    """A quantised checkpoint, and its weights in fp32 as another."""

    quantized: Path
    plain: Path


def in_blocks(weight: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """e4m3 codes and the fp32 scale of each block of a weight [..., N, D]."""
    *lead, outputs, inputs = weight.shape
    scales = torch.ones(*lead, -(-outputs // rows), -(-inputs // columns))
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[-2]):
        for j in range(scales.shape[-1]):
            at = (..., slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            largest = weight[at].abs().amax(dim=(-2, -1)).clamp(min=1e-12)
            scales[..., i, j] = largest / LARGEST
            codes[at] = (weight[at] / scales[..., i, j, None, None]).to(torch.float8_e4m3fn)
    return codes, scales


def from_blocks(codes: Tensor, scales: Tensor, rows: int, columns: int) -> Tensor:
    """The weight of `in_blocks`, fp32."""
    *_, outputs, inputs = codes.shape
    wide = scales.repeat_interleave(rows, -2).repeat_interleave(columns, -1)
    return codes.float() * wide[..., :outputs, :inputs]


def fused(tensors: Tensors) -> Tensors:
    """Experts' own tensors stacked as in transformers 5: `gate_up_proj` [E, 2I, D] and `down_proj` [E, D, I]."""
    out = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for base in sorted({name.split(".experts.")[0] + ".experts" for name in tensors.keys() - out.keys()}):
        experts = range(sum(name.startswith(f"{base}.") for name in tensors) // 3)
        gate, up, down = (
            torch.stack([tensors[f"{base}.{e}.{p}_proj.weight"] for e in experts])
            for p in ("gate", "up", "down")
        )
        out |= {f"{base}.gate_up_proj": torch.cat([gate, up], dim=1), f"{base}.down_proj": down}
    return out


def is_linear(name: str) -> bool:
    return "_proj.weight" in name or name.endswith(("experts.gate_up_proj", "experts.down_proj"))


def write_twins(
    path: Path,
    store: Callable[[str, Tensor], tuple[Tensors, Tensor]],
    config: dict[str, Any],
    stacks: bool = False,
    original: Path | None = None,
    **shape: Any,
) -> Twins:
    """Writes a seeded model, or the one at `original`, twice. `store` turns a linear weight into the tensors of the
    quantised checkpoint and the weight that they stand for; `config` is the quantised one's `quantization_config`."""
    if original is None:
        plain = write_checkpoint(path / "plain", **shape)
    else:
        plain = Path(shutil.copytree(original, path / "plain"))
    tensors = load_file(plain / "model.safetensors")
    tensors = {name: tensor.float() if is_linear(name) else tensor for name, tensor in tensors.items()}
    tensors = fused(tensors) if stacks else tensors
    quantized = Path(shutil.copytree(plain, path / "quantized"))
    codes: Tensors = {}
    for name, tensor in tensors.items():
        if is_linear(name):
            stored, tensors[name] = store(name, tensor)
            codes |= stored
        else:
            codes[name] = tensor
    for where, what in ((plain, tensors), (quantized, codes)):
        save_file({n: t.contiguous() for n, t in what.items()}, where / "model.safetensors", {"format": "pt"})
    edit_config(quantized, quantization_config=config)
    return Twins(quantized, plain)


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def write_fp8(
    path: Path, rows: int, columns: int, alone: tuple[str, ...] = (), stacks: bool = False, **shape: Any
) -> Twins:
    """FP8 by blocks, with the settings that Qwen's own checkpoints have. The modules `alone` are not quantised."""

    def store(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        if any(part in name for part in alone):
            return {name: weight}, weight
        codes, scales = in_blocks(weight, rows, columns)
        scales = scales.bfloat16()
        scale_name = f"{name}_scale_inv"
        return {name: codes, scale_name: scales}, from_blocks(codes, scales.float(), rows, columns)

    config = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [rows, columns],
        "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate", *alone],
    }
    return write_twins(path, store, config, stacks, **shape)


def write_channels(path: Path, whole: bool = False, int8: bool = False, **shape: Any) -> Twins:
    """compressed-tensors in FP8, or int8 if `int8`, with a scale for each output or, if `whole`, for each tensor."""

    def store(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        largest = weight.abs().amax() if whole else weight.abs().amax(dim=1, keepdim=True)
        scales = (largest / (127 if int8 else LARGEST)).bfloat16()
        codes = weight / scales.float()
        codes = codes.round().clamp(-127, 127).to(torch.int8) if int8 else codes.to(torch.float8_e4m3fn)
        stored = {name: codes, f"{name}_scale": scales.reshape(1) if whole else scales}
        return stored, codes.float() * scales.float()

    weights = {
        "num_bits": 8,
        "type": "int" if int8 else "float",
        "symmetric": True,
        "strategy": "tensor" if whole else "channel",
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if int8 else "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }
    return write_twins(path, store, config, **shape)
