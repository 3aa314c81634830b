"""Takes a loaded model into a layout with more or fewer dp groups. Attention, dense layers and the experts that the
rank keeps stay in memory; it reads the experts that are new to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from qwen3_dist.expert_placement import ExpertPlacement, Placements
from qwen3_dist.model.feed_forward import MoEFeedForward
from qwen3_dist.model.finalize import fuse
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.protocol.messages import Progress
from qwen3_dist.weights.loader import ExpertReader
from qwen3_dist.weights.lora_loader import drop_adapters


def keeps_its_part(model: Qwen3Model, parallel: ParallelContext) -> bool:
    """Whether this rank has the same part of each weight in the layout of `parallel`, but for whole experts."""

    def part(of: ParallelContext) -> tuple[object, ...]:
        of_experts = (of.etp.size, of.etp.rank) if model.moe_layers else ()
        return (of.layout.pp, of.coords.stage, of.layout.tp, of.coords.tp_rank, type(of.tp), *of_experts)

    return part(model.parallel) == part(parallel)


@torch.inference_mode()
def regroup(
    model: Qwen3Model,
    parallel: ParallelContext,
    placements: Placements,
    path: Path,
    random: bool,
    progress: Progress,
) -> None:
    """Gives a finalized `model` the groups of `parallel`, in which it `keeps_its_part`, and the experts of
    `placements`. Drops its adapters. New ones are read from the checkpoint at `path`, or made if weights are `random`.

    Raises CheckpointError or OSError; then the model is of no use.
    """
    model.parallel = parallel.with_tp_of(model.parallel)
    model.whole_stage = None
    drop_adapters(model)
    reader, done = ExpertReader(path, model, random), 0

    def advance(size: int) -> None:
        nonlocal done
        done += size

    for block in model.blocks:
        ff = block.ff
        if isinstance(ff, MoEFeedForward):
            ff = _regrouped(model, ff, block.layer, placements[block.layer], reader, advance)
        block.use(ff)
        progress(done, done)
    fuse(model)


def _regrouped(
    model: Qwen3Model,
    old: MoEFeedForward,
    layer: int,
    placement: ExpertPlacement,
    reader: ExpertReader,
    advance: Callable[[int], None],
) -> MoEFeedForward:
    """The MoE layer `old` in the model's new groups, with the experts of `placement`."""
    with torch.device("meta"):
        new = MoEFeedForward(model.config, model.parallel, placement, model.ops, model.overflow)
    held = {expert: place for place, expert in enumerate(old.hosted)}
    arriving = [expert for expert in new.hosted if expert not in held]
    tensors = tuple(tensor.to(model.device) for tensor in reader.read(layer, arriving, advance))
    new.experts.take(old.experts, [held.get(expert) for expert in new.hosted], tensors)
    new.gate = old.gate
    return new.eval()
