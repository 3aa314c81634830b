"""Checkpoints with packed codes beside the same model in fp32, as `quantized.py` has them for codes of a byte.

They are written from each format's definition. The reader was also compared once, by hand, with what the packing code
of compressed-tensors 0.20.1 (int4, int8, NVFP4, MXFP4), AutoAWQ 0.2.9 and AutoGPTQ 0.7.1 (4 bits with and without
`desc_act`, 8 bits) writes; not with GPTQModel's `gptq_v2`, ModelOpt or `weight_g_idx`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.quantized import Tensors, Twins, write_twins

IGNORED = ["lm_head", "re:.*mlp.gate$"]


Store = Callable[[str, Tensor], tuple[Tensors, Tensor]]


def of_experts(store: Store, mark: str) -> Store:
    """`store` also for the fused experts of transformers 5: each expert's gate, up and down is stored alone, and
    their tensors are stacked [E, ...], those of gate and up one after the other. A stack's name ends with `mark` and
    the end of a single tensor's name: "." in llm-compressor's repacking, "_" in ModelOpt, whose codes have no end."""

    def both(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        if weight.ndim == 2:
            return store(name, weight)
        halves = weight.chunk(2, dim=1) if name.endswith("gate_up_proj") else (weight,)
        made = [[store(f"{name}.weight", half[expert]) for half in halves] for expert in range(len(weight))]
        tensors: Tensors = {}
        for key in made[0][0][0]:
            parts = [[each[key] for each, _ in row] for row in made]
            end = key.removeprefix(f"{name}.")
            if end == "weight_shape":
                whole = torch.tensor(weight.shape)
            elif parts[0][0].numel() == 1:
                whole = torch.stack([torch.stack(row).flatten() for row in parts])
            else:
                whole = torch.stack([torch.cat(row) for row in parts])
            tensors[name if (mark, end) == ("_", "weight") else f"{name}{mark}{end}"] = whole
        return tensors, torch.stack([torch.cat([values for _, values in row]) for row in made])

    return both


class Grouped(NamedTuple):
    """Codes [N, D] from 0 on, scales and zeros [N, groups], the group of each input [D], and the weight, fp32."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    order: Tensor
    weight: Tensor


def in_groups(
    weight: Tensor, bits: int, size: int | None, zeros: bool = False, order: bool = False
) -> Grouped:
    """Rounds a weight to integers by groups of `size` inputs; None: one group. With `order` the inputs of a group are
    some of all, as those of like activations are."""
    outputs, inputs = weight.shape
    size, top = size or inputs, 2**bits - 1
    groups = torch.arange(inputs) // size
    if order:
        groups = groups[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
    count = -(-inputs // size)
    lowest, highest = torch.zeros(outputs, count), torch.zeros(outputs, count)
    index = groups.expand(outputs, -1)
    lowest.scatter_reduce_(1, index, weight, "amin")
    highest.scatter_reduce_(1, index, weight, "amax")
    if zeros:
        scales = ((highest - lowest) / top).clamp(min=1e-8).half().float()
        middle = (-lowest / scales).round().clamp(0, top)
    else:
        scales = (torch.maximum(highest, -lowest) / (top // 2)).clamp(min=1e-8).half().float()
        middle = torch.full_like(scales, 2 ** (bits - 1))
    codes = (weight / scales[:, groups] + middle[:, groups]).round().clamp(0, top)
    return Grouped(
        codes.int(), scales, middle.int(), groups.int(), (codes - middle[:, groups]) * scales[:, groups]
    )


def in_words(numbers: Tensor, bits: int, axis: int, places: tuple[int, ...] | None = None) -> Tensor:
    """Packs numbers [a, b] in int32 words along an axis, each at its place, the lowest first."""
    per_word = 32 // bits
    rows = numbers.movedim(axis, -1).long()
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % per_word)).unflatten(-1, (-1, per_word))
    shifts = bits * torch.tensor(places or range(per_word))
    return (rows << shifts).sum(-1).int().movedim(-1, axis).contiguous()


def write_pack_quantized(
    path: Path,
    bits: int = 4,
    size: int | None = 32,
    zeros: bool = False,
    order: bool = False,
    alone: tuple[str, ...] = (),
    **shape: Any,
) -> Twins:
    """compressed-tensors' `pack-quantized`, by groups or, without `size`, by outputs. The modules `alone` are not
    quantised."""

    def store(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        if any(part in name for part in alone):
            return {name: weight}, weight
        made = in_groups(weight, bits, size, zeros, order)
        stored = {
            f"{name}_packed": in_words(made.codes, bits, 1),
            f"{name}_scale": made.scales.half(),
            f"{name}_shape": torch.tensor(weight.shape),
        }
        if zeros:
            stored[f"{name}_zero_point"] = in_words(made.zeros, bits, 0)
        if order:
            stored[f"{name}_g_idx"] = made.order
        return stored, made.weight

    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": not zeros,
        "strategy": "group" if size else "channel",
        "group_size": size,
        "actorder": "group" if order else None,
        "observer": "minmax",
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": [*IGNORED, *(f"re:.*{name}.*" for name in alone)],
    }
    return write_twins(path, of_experts(store, "."), config, **shape)


AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


def write_awq(path: Path, size: int = 32, alone: tuple[str, ...] = (), **shape: Any) -> Twins:
    """AutoAWQ's `gemm`: words have eight outputs, in the order 0, 2, 4, 6, 1, 3, 5, 7."""

    def store(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        if any(part in name for part in alone):
            return {name: weight}, weight
        made, base = in_groups(weight, 4, size, zeros=True), name.removesuffix("weight")
        stored = {
            f"{base}qweight": in_words(made.codes.t(), 4, 1, AWQ_PLACES),
            f"{base}qzeros": in_words(made.zeros.t(), 4, 1, AWQ_PLACES),
            f"{base}scales": made.scales.half().t(),
        }
        return stored, made.weight

    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(alone) or None,
    }
    return write_twins(path, store, config, **shape)


def write_gptq(
    path: Path,
    bits: int = 4,
    size: int = 32,
    sym: bool = True,
    order: bool = False,
    v2: bool = False,
    **shape: Any,
) -> Twins:
    """GPTQModel's `gptq`, whose zeros are one less, or `gptq_v2`. GPTQModel takes the ones from whole words of
    `gptq_v2` (`convert_gptq_v2_to_v1_format_module`), so a zero of 0 borrows from the next in its word."""
    ones = sum(1 << place for place in range(0, 32, bits))

    def store(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        if not sym:
            weight = torch.cat([weight[:1].abs(), weight[1:]])  # the zeros of the first output are 0
        made = in_groups(weight, bits, None if size == -1 else size, not sym, order)
        base, zeros = name.removesuffix("weight"), in_words(made.zeros.t(), bits, 1)
        stored = {
            f"{base}qweight": in_words(made.codes.t(), bits, 0),
            f"{base}qzeros": zeros if v2 else zeros - ones,
            f"{base}scales": made.scales.half().t(),
            f"{base}g_idx": made.order,
        }
        return stored, made.weight

    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": size,
        "desc_act": order,
        "sym": sym,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
        "damp_percent": 0.01,
        "true_sequential": True,
        "lm_head": False,
        "dynamic": {r"-:.*lm_head": {}},
    }
    return write_twins(path, store, config, **shape)


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def write_fp4(path: Path, kind: str = "nvfp4", alone: tuple[str, ...] = (), **shape: Any) -> Twins:
    """e2m1 codes as `nvfp4` or `mxfp4` of compressed-tensors, or in the spelling of `modelopt`. The inputs of a weight
    whose groups do not cover it are an odd end."""
    size, modelopt = 32 if kind == "mxfp4" else 16, kind == "modelopt"

    def store(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        if any(part in name for part in alone):
            return {name: weight}, weight
        groups = torch.arange(weight.shape[1]) // size
        largest = torch.zeros(len(weight), int(groups[-1]) + 1)
        largest.scatter_reduce_(1, groups.expand(len(weight), -1), weight.abs(), "amax")
        whole = torch.ones(1) if kind == "mxfp4" else weight.abs().max().reshape(1) / (6 * 448)
        if kind == "mxfp4":
            scales = (largest / 6).log2().ceil().exp2().to(torch.float8_e8m0fnu)
        else:
            scales = (largest / 6 / whole).to(torch.float8_e4m3fn)
        by = (scales.float() * whole)[:, groups]
        distance = ((weight / by).abs()[..., None] - E2M1).abs()
        codes = distance.argmin(-1)
        values = E2M1[codes] * weight.sign()
        codes = (codes + 8 * (weight < 0)).to(torch.uint8)
        codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
        stored = {
            name if modelopt else f"{name}_packed": codes[:, ::2] + 16 * codes[:, 1::2],
            f"{name}_scale": scales.view(torch.uint8) if kind == "mxfp4" else scales,
        }
        if modelopt:
            stored[f"{name}_scale_2"] = whole[0]
        elif kind == "nvfp4":
            stored[f"{name}_global_scale"] = 1 / whole
        return stored, values * by

    if modelopt:
        config = {
            "quant_method": "modelopt",
            "quant_algo": "NVFP4",
            "ignore": ["lm_head", *(f"*{name}*" for name in alone)],
            "producer": {"name": "modelopt", "version": "0.39"},
        }
        return write_twins(path, of_experts(store, "_"), config, **shape)
    weights = {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor_group" if kind == "nvfp4" else "group",
        "group_size": size,
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": [*IGNORED, *(f"re:.*{name}.*" for name in alone)],
    }
    return write_twins(path, of_experts(store, "."), config, **shape)
