"""Loads this rank's part of LoRA adapters.

If a weight is split by outputs, `lora_B` is; if it is split by inputs, `lora_A` is. So `WeightPlan` also says which
part of an adapter a rank reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3_dist.lora_adapters import LoraAdapters
from qwen3_dist.model.linear import Linear
from qwen3_dist.model.lora import DeterministicLowRank, LowRank
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.weights.adapter_files import Adapter, adapted_pieces, open_adapters
from qwen3_dist.weights.pieces import Piece
from qwen3_dist.weights.weight_plan import WeightPlan


def load_adapters(adapters: LoraAdapters, model: Qwen3Model) -> None:
    """Loads this rank's part of every adapter into the linear layers of `model`, in the model's dtype.

    Raises what `open_adapters` raises.
    """
    loaded = open_adapters(adapters, model.config)
    if not loaded:
        return
    largest = max(adapter.rank for adapter in loaded)
    deterministic = model.parallel.deterministic
    plan = WeightPlan(model.config, model.parallel.layout, set(), deterministic=deterministic)
    for piece in adapted_pieces(plan.plain_pieces(model.parallel.coords)):
        adapting = [adapter.pair_of(piece.source) in adapter.pairs for adapter in loaded]
        if not any(adapting):
            continue
        layer = model.get_submodule(piece.parameter.removesuffix(".weight"))
        assert isinstance(layer, Linear)
        a, b = (
            torch.zeros(len(loaded), largest, width, dtype=model.dtype, device=model.device)
            for width in (layer.in_features, layer.out_features)
        )
        for place, adapter in enumerate(loaded):
            if adapting[place]:
                _read(adapter, piece, a[place], b[place])
        layer.low_rank = DeterministicLowRank(a, b, model.ops) if deterministic else LowRank(a, b)


def _read(adapter: Adapter, piece: Piece, a: Tensor, b: Tensor) -> None:
    """Fills a [R, I] and b [R, O], this rank's part of a weight, up to the adapter's rank."""
    pair, whole = adapter.pair_of(piece.source), slice(None)
    rank, scale = adapter.pairs[pair]
    outputs, inputs = (*piece.index, slice(None))[:2]
    to_outputs, to_inputs = (*piece.target, slice(None))[:2]
    adapter.files.read(f"{pair}.lora_A.weight", (whole, inputs), a[:rank, to_inputs])
    out = torch.empty(b[0, to_outputs].shape[0], rank)
    adapter.files.read(f"{pair}.lora_B.weight", (outputs, whole), out)
    b[:rank, to_outputs] = out.mul_(scale).t().to(b)
