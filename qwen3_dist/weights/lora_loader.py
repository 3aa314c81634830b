"""Loads this rank's part of LoRA adapters.

If a weight is split by outputs, `lora_B` is; if it is split by inputs, `lora_A` is. So `WeightPlan` also says which
part of an adapter a rank reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_dist.lora_adapters import LoraAdapters, NextAdapters
from qwen3_dist.model.expert_lora import ExpertLowRank
from qwen3_dist.model.linear import Linear
from qwen3_dist.model.lora import DeterministicLowRank, LowRank
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.weights.adapter_files import Adapter, adapted_pieces
from qwen3_dist.weights.expert_lora_loader import read_expert_adapters
from qwen3_dist.weights.pieces import Piece
from qwen3_dist.weights.weight_plan import WeightPlan


@dataclass(frozen=True)
class LowRanks:
    """A rank's adapters: of linear layers, and of the experts of layers by their numbers, where adapters change them.
    `files` are the adapters' files, by place."""

    linears: dict[Linear, LowRank]
    experts: dict[int, ExpertLowRank]
    files: tuple[Adapter, ...]


def load_adapters(adapters: LoraAdapters, model: Qwen3Model) -> None:
    """Loads this rank's part of every adapter into the linear layers of `model`, in the model's dtype, in place of
    those that it has. Raises what `open_adapters` raises."""
    use_adapters(adapters, model, read_adapters(NextAdapters(adapters, (None,) * len(adapters.pairs)), model))


def has_only(model: Qwen3Model, adapters: LoraAdapters) -> bool:
    """Whether the model has these adapters, and none that it does not name."""
    return model.adapters == adapters and len(model.adapter_files) == len(adapters.pairs)


def drop_adapters(model: Qwen3Model) -> None:
    """Takes all adapters from the model."""
    use_adapters(LoraAdapters(), model, LowRanks({}, {}, ()))


def use_adapters(adapters: LoraAdapters, model: Qwen3Model, low_ranks: LowRanks) -> None:
    """Makes the layers of `model` use what `read_adapters` returned for these `adapters`."""
    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.low_rank = low_ranks.linears.get(layer)
    for number, moe in model.moe_layers.items():
        moe.experts.low_rank = low_ranks.experts.get(number)
    model.adapters, model.adapter_files = adapters, low_ranks.files


def read_adapters(to: NextAdapters, model: Qwen3Model) -> LowRanks:
    """Reads this rank's part of the adapters of `to` that it does not have, and puts all together. Changes nothing of
    `model`. Raises what `open_adapters` raises."""
    sources: list[Adapter | int] = [
        Adapter.open(name, path, model.config) if place is None else place
        for (name, path), place in zip(to.adapters.pairs, to.kept, strict=True)
    ]
    sources += to.leaving
    files = tuple(model.adapter_files[each] if isinstance(each, int) else each for each in sources)
    linears: dict[Linear, LowRank] = {}
    experts: dict[int, ExpertLowRank] = {}
    if not sources:
        return LowRanks(linears, experts, files)
    deterministic = model.parallel.deterministic
    kind = DeterministicLowRank if deterministic else LowRank
    plan = WeightPlan(model.config, model.parallel.layout, set(), deterministic=deterministic)
    for piece in adapted_pieces(plan.plain_pieces(model.parallel.coords)):
        layer = model.get_submodule(piece.parameter.removesuffix(".weight"))
        assert isinstance(layer, Linear)
        of_layer = [each if isinstance(each, int) else _read(each, piece, layer, model) for each in sources]
        low_rank = kind.of(of_layer, layer.low_rank, model.ops)
        if low_rank is not None:
            linears[layer] = low_rank
    for number, moe in model.moe_layers.items():
        of_experts = read_expert_adapters(sources, files, number, moe.hosted, model)
        if of_experts is not None:
            experts[number] = of_experts
    return LowRanks(linears, experts, files)


def _read(adapter: Adapter, piece: Piece, layer: Linear, model: Qwen3Model) -> tuple[Tensor, Tensor] | None:
    """This rank's part of an adapter's weights for a layer: a [r, I] and b [r, O]; None if it does not change it."""
    pair, whole = adapter.pair_of(piece.source), slice(None)
    if pair in adapter.saved:
        return _replacing(adapter, pair, layer, model)
    if pair not in adapter.pairs:
        return None
    rank, scale = adapter.pairs[pair]
    a, b = (
        torch.zeros(rank, width, dtype=model.dtype, device=model.device)
        for width in (layer.in_features, layer.out_features)
    )
    outputs, inputs = (*piece.index, slice(None))[:2]
    to_outputs, to_inputs = (*piece.target, slice(None))[:2]
    adapter.files.read(f"{pair}.lora_A.weight", (whole, inputs), a[:, to_inputs])
    out = torch.empty(b[0, to_outputs].shape[0], rank)
    adapter.files.read(f"{pair}.lora_B.weight", (outputs, whole), out)
    b[:, to_outputs] = out.mul_(scale).t().to(b)
    return a, b


def _replacing(adapter: Adapter, pair: str, layer: Linear, model: Qwen3Model) -> tuple[Tensor, Tensor]:
    """The whole router that an adapter holds, as the difference a [O, I] to the model's, with b = 1 [O, O]."""
    eye = torch.eye(layer.in_features, dtype=model.dtype, device=model.device)
    [weight] = layer.products(
        eye
    )  # [I, O]; a layer that is finalized has its weight in the layout of the Ops
    saved = torch.empty(layer.out_features, layer.in_features, device=model.device)
    adapter.files.read(f"{pair}.weight", (slice(None),), saved)
    a = saved.sub_(weight.t().float()).to(model.dtype)
    return a, torch.eye(layer.out_features, dtype=model.dtype, device=model.device)
