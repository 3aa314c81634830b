"""Loads this rank's part of the adapters of experts, from each layout in which they are written.

As with linear layers, a rank that has some outputs of a product has these of B, and one that has some inputs has these
of A. A rank has the adapters of the experts that it hosts.

Legend: e experts of this rank, r the rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_dist.model.expert_lora import ExpertAdapter, ExpertLowRank
from qwen3_dist.model.experts import ExpertShape
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.weights.adapter_files import Adapter
from qwen3_dist.weights.expert_adapters import DOWN, GATE_UP, PROJECTIONS, StackedPair
from qwen3_dist.weights.weight_plan import WeightPlan


def read_expert_adapters(
    adapters: Sequence[Adapter | int],
    files: Sequence[Adapter],
    layer: int,
    hosted: Sequence[int],
    model: Qwen3Model,
) -> ExpertLowRank | None:
    """The adapters of the experts `hosted` of a layer, in this order of places; None if none changes an expert of the
    layer, on whatever rank. One with a number is what the model has at this place for the experts that it hosts now.
    `files` are those of all of them. Raises CheckpointError."""
    if not any(each.changes_experts(layer) for each in files):
        return None
    before = model.moe_layers[layer].experts.low_rank
    parts: list[ExpertAdapter | None] = []
    for each in adapters:
        if isinstance(each, int):
            parts.append(before.adapters[each] if before is not None else None)
        else:
            parts.append(_read(each, layer, hosted, model))
    return ExpertLowRank(parts, model.ops)


@dataclass(frozen=True)
class _Part:
    """This rank's part of a projection: its outputs and inputs in the whole, and in the rank's part."""

    outputs: slice
    inputs: slice
    to_outputs: slice
    to_inputs: slice


def _read(adapter: Adapter, layer: int, hosted: Sequence[int], model: Qwen3Model) -> ExpertAdapter | None:
    if not adapter.changes_experts(layer):
        return None
    parallel, whole = model.parallel, slice(None)
    plan = WeightPlan(model.config, parallel.layout, set(), deterministic=parallel.deterministic)
    parts = {}
    for piece in plan.expert_pieces(layer, hosted[:1], parallel.coords):
        index, target = (*piece.index, whole)[:2], piece.target[1:]
        parts[piece.parameter] = _Part(*index, *target)
    name = f"base_model.model.model.layers.{layer}.mlp.experts"
    stacks: list[tuple[Tensor, Tensor] | None] = []
    for which, (outputs, inputs) in enumerate(ExpertShape.of(model.config, parallel).matrices):
        source = _Source.of(adapter, name, which, hosted, model)
        if source is None:
            stacks.append(None)
            continue
        a = torch.zeros(len(hosted), source.rank, inputs, dtype=model.dtype, device=model.device)
        b = torch.zeros(len(hosted), outputs, source.rank, dtype=model.dtype, device=model.device)
        part = parts.get(f"fc{which + 1}")  # none if this rank has padding alone
        if part is not None:
            source.read(part, a, b)
        stacks.append((a, b))
    return ExpertAdapter.of(stacks, model.ops)


@dataclass(frozen=True)
class _Source:
    """One projection of the experts `hosted` in an adapter's file."""

    adapter: Adapter
    hosted: Sequence[int]
    rank: int  # the largest

    @staticmethod
    def of(
        adapter: Adapter, name: str, which: int, hosted: Sequence[int], model: Qwen3Model
    ) -> _Source | None:
        """None if the adapter does not change the projection in an expert of `hosted`."""
        stacked = adapter.stacked.get(f"{name}.{DOWN if which == 2 else GATE_UP}")
        if stacked is not None:
            first = model.config.moe_hidden_dim if which == 1 else 0
            size = model.config.emb_dim if which == 2 else model.config.moe_hidden_dim
            return _Stacked(adapter, hosted, stacked.rank, stacked, range(first, first + size))
        pairs = [f"{name}.{expert}.{PROJECTIONS[which]}" for expert in hosted]
        ranks = [adapter.pairs[pair][0] for pair in pairs if pair in adapter.pairs]
        return _Single(adapter, hosted, max(ranks), pairs) if ranks else None

    def read(self, part: _Part, a: Tensor, b: Tensor) -> None:
        """Fills a [e, r, inputs] and b [e, outputs, r], which includes the scale, where `part` says."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Single(_Source):
    """Pairs of single experts."""

    pairs: Sequence[str]

    def read(self, part: _Part, a: Tensor, b: Tensor) -> None:
        files, whole = self.adapter.files, slice(None)
        for place, pair in enumerate(self.pairs):
            if pair not in self.adapter.pairs:
                continue
            rank, scale = self.adapter.pairs[pair]
            files.read(f"{pair}.lora_A.weight", (whole, part.inputs), a[place, :rank, part.to_inputs])
            to = b[place, part.to_outputs, :rank]
            out = torch.empty(to.shape)
            files.read(f"{pair}.lora_B.weight", (part.outputs, whole), out)
            to.copy_(out.mul_(scale))


@dataclass(frozen=True)
class _Stacked(_Source):
    """A pair of stacked experts. `range` are the projection's outputs among those of the stacked weight."""

    stacked: StackedPair
    outputs: range

    def read(self, part: _Part, a: Tensor, b: Tensor) -> None:
        mine = self.outputs[part.outputs]
        outputs = slice(mine.start, mine.stop)
        if self.stacked.swapped:
            of_inputs, of_outputs = self._columns("B", part.inputs), self._rows("A", outputs)
        else:
            of_inputs, of_outputs = self._rows("A", part.inputs), self._columns("B", outputs)
        a[:, :, part.to_inputs] = of_inputs.to(a)
        b[:, part.to_outputs] = of_outputs.float().mul_(self.stacked.scale).transpose(1, 2).to(b)

    def _rows(self, letter: str, part: slice) -> Tensor:
        """Of a tensor [E * r, n]: [e, r, part of n]."""
        files, name, rank = self.adapter.files, f"{self.stacked.source}.lora_{letter}.weight", self.rank
        return torch.stack(
            [files.take(name, (slice(expert * rank, (expert + 1) * rank), part)) for expert in self.hosted]
        )

    def _columns(self, letter: str, part: slice) -> Tensor:
        """Of a tensor [n, r * E]: [e, r, part of n]."""
        rows = self.adapter.files.take(f"{self.stacked.source}.lora_{letter}.weight", (part, slice(None)))
        return rows.unflatten(1, (self.rank, -1))[:, :, list(self.hosted)].permute(2, 1, 0)
