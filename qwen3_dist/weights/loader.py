"""Fills a rank's model from its own slices of a checkpoint, and checks that no tensor is missing or left over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from qwen3_dist.config import ModelConfig
from qwen3_dist.errors import CheckpointError
from qwen3_dist.expert_placement import Placements
from qwen3_dist.model.experts import Experts, ExpertShape
from qwen3_dist.model.quantized import Codes, Quantizable
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.ops.base import Ops
from qwen3_dist.ops.choose import choose_ops
from qwen3_dist.ops.host_memory import zeros
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.protocol.messages import Progress
from qwen3_dist.quantization import NIBBLES
from qwen3_dist.weights import random_weights
from qwen3_dist.weights.checks import check_names, check_order, check_scales, check_tensor
from qwen3_dist.weights.files import CheckpointFiles
from qwen3_dist.weights.packed import read_packed
from qwen3_dist.weights.pieces import COMPANIONS, DIVISOR, MULTIPLIER, ORDER, SCALE, Piece
from qwen3_dist.weights.read_runs import Region, read_regions
from qwen3_dist.weights.rounding import read_rounded
from qwen3_dist.weights.weight_plan import WeightPlan


@dataclass(frozen=True)
class UnloadedModel:
    """A rank's shard on the meta device, and the `pieces` of `files` that fill it, at random without files."""

    model: Qwen3Model
    pieces: list[Piece]
    files: CheckpointFiles | None

    def load(
        self, modules: Iterable[nn.Module], device: torch.device, advance: Callable[[int], None]
    ) -> None:
        """Loads the own parameters of some of the model's modules, whose padding is zero. `advance` is called with
        numbers of bytes."""
        parameters = _materialise(self.model, modules, device)
        pieces = [piece for piece in self.pieces if piece.parameter in parameters and not piece.is_empty]
        _read_all(self.files, pieces, parameters, advance)
        filled = {piece.parameter for piece in pieces}
        unfilled = [name for name in parameters if name not in filled and not _may_be_padding(name)]
        assert not unfilled, f"no rule fills {unfilled}"

    @property
    def num_bytes(self) -> int:
        """The bytes that `load` fills in all modules together."""
        parameters = dict(self.model.named_parameters())
        filled = [piece for piece in self.pieces if not piece.is_empty]
        return sum(parameters[piece.parameter][piece.place].nbytes for piece in filled)


def load_model(
    path: Path,
    config: ModelConfig,
    parallel: ParallelContext,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    random: bool = False,
    placements: Placements | None = None,
    ops: Ops | None = None,
) -> Qwen3Model:
    """Builds this rank's shard on `device`. With `random`, weights need no checkpoint. `ops` are by default those of
    `choose_ops`. Raises what `open_model` raises."""
    ops = ops or choose_ops(device, dtype)
    unloaded = open_model(path, config, parallel, dtype, ops, random, placements)
    unloaded.load(unloaded.model.modules(), device, counting(progress, unloaded.num_bytes))
    return unloaded.model


def counting(progress: Progress | None, total: int) -> Callable[[int], None]:
    """What adds up numbers of bytes of `total`, and reports them."""
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        if progress:
            progress(done, total)

    return advance


def open_model(
    path: Path,
    config: ModelConfig,
    parallel: ParallelContext,
    dtype: torch.dtype,
    ops: Ops,
    random: bool = False,
    placements: Placements | None = None,
) -> UnloadedModel:
    """Checks this rank's part of the checkpoint at `path`, by the headers of its files. Raises CheckpointError with
    the names of tensors that are missing, left over or do not have the shape of `config`."""
    files = None if random else CheckpointFiles(path)
    if (
        files and files.is_headless
    ):  # an embedding model: its head is never used, so it is tied to the embedding
        config = replace(config, tie_word_embeddings=True)
    names = files.names() if files else set()
    plan = WeightPlan(config, parallel.layout, names, placements, parallel.deterministic)
    if files:
        check_names(path, files, plan)
    pieces = list(plan.all_pieces(parallel.coords))
    if files:
        for piece in pieces:
            check_tensor(files, piece)
    with torch.device("meta"):
        model = Qwen3Model(config, parallel, ops, placements).to(dtype).eval().requires_grad_(False)
    _hold_codes(model, pieces)
    return UnloadedModel(model, pieces, files)


class ExpertReader:
    """Reads this rank's columns of single experts from the checkpoint at `path`, which `model` was loaded from.

    Headers are read once, at the first call.
    """

    def __init__(self, path: Path, model: Qwen3Model, random: bool) -> None:
        self._path = path
        self._model = model
        self._random = random

    @cached_property
    def _files(self) -> CheckpointFiles | None:
        return None if self._random else CheckpointFiles(self._path)

    @cached_property
    def _plan(self) -> WeightPlan:
        names, parallel = self._files.names() if self._files else set(), self._model.parallel
        return WeightPlan(self._model.config, parallel.layout, names, deterministic=parallel.deterministic)

    def read(
        self, layer: int, experts: Sequence[int], progress: Callable[[int], None] = lambda size: None
    ) -> tuple[Tensor, ...]:
        """Returns fc1 and fc2 [n, I, D] and fc3 [n, D, I] of `experts` of a layer, and in a quantised checkpoint their
        scales, on the CPU: what `Experts.convert` takes.

        Random weights are generated on the model's device, with the same values as at loading. `progress` is called
        with numbers of bytes that were read. Raises CheckpointError or OSError.
        """
        parallel, device = self._model.parallel, self._model.device if self._random else torch.device("cpu")
        with torch.device("meta"):
            shape = ExpertShape.of(self._model.config, parallel)
            module = Experts(len(experts), shape, self._model.ops).to(self._model.dtype)
        for name, codes in self._model.moe_layers[layer].experts.codes.items():
            module.hold_codes(name, codes)
        stacks = {name: zeros(each.shape, each.dtype, device) for name, each in module.named_parameters()}
        if experts:
            pieces = list(self._plan.expert_pieces(layer, experts, parallel.coords))
            if self._files:
                for piece in pieces:
                    check_tensor(self._files, piece)
            _read_all(self._files, pieces, stacks, progress)
        return tuple(stacks[name] for name in module.tensor_names)


def _read_all(
    files: CheckpointFiles | None,
    pieces: Sequence[Piece],
    parameters: dict[str, Tensor],
    advance: Callable[[int], None],
) -> None:
    """Reads what lies in the files as it stays, several files at once, then the rest."""
    plain: list[Region] = []
    rest: list[tuple[Piece, Tensor]] = []
    for piece in pieces:
        view = parameters[piece.parameter][piece.place]
        scales_all = piece.stored in (DIVISOR, MULTIPLIER)
        if (
            view.ndim > len(piece.shape) and not scales_all
        ):  # one expert's own tensor into its place in the stack
            view = view.squeeze(0)
        if files is None:
            random_weights.fill(piece, view)
            advance(view.nbytes)
        elif _is_plain(files, piece):
            plain.append(Region(piece.source, piece.index, view))
        else:
            rest.append((piece, view))
    if files is not None:
        read_regions(files, plain, advance)
        for piece, view in rest:
            _read(files, piece, view, parameters, advance)
        for piece in pieces:
            if piece.stored == ORDER:
                check_order(piece, parameters[piece.parameter][piece.place])
        check_scales(pieces, parameters)


def _is_plain(files: CheckpointFiles, piece: Piece) -> bool:
    """Whether a piece is a region of its source and no more."""
    is_number = piece.stored in (DIVISOR, MULTIPLIER)
    made = piece.rounds is not None or piece.packing is not None or is_number
    return not made and files.shape(piece.source) == piece.shape


def _read(
    files: CheckpointFiles,
    piece: Piece,
    view: Tensor,
    parameters: dict[str, Tensor],
    advance: Callable[[int], None],
) -> None:
    if piece.rounds is not None:
        if piece.stored != SCALE:  # the codes, with which their scales are made
            read_rounded(files, piece, view, parameters[f"{piece.parameter}_scale"])
        advance(view.nbytes)
    elif piece.stored in (DIVISOR, MULTIPLIER):
        factor = _factors(piece, files.read_whole(piece.source)).to(view.device)
        view.mul_(factor) if piece.stored == MULTIPLIER else view.div_(factor)
        advance(view.nbytes)
    elif piece.packing is not None:
        read_packed(files, piece, view, advance)
    else:  # a scale for all outputs, or without a dimension of inputs
        scale = files.read_whole(piece.source)
        whole = scale.view(piece.shape) if scale.numel() == prod(piece.shape) else scale.view(1, 1)
        view.copy_(whole.expand(piece.shape)[piece.index])
        advance(view.nbytes)


def _factors(piece: Piece, stored: Tensor) -> Tensor:
    """The numbers [e, 1, 1] by which the scales of the piece's experts are divided or multiplied; [] of a single
    weight. Raises CheckpointError for one that is infinite, no number, or negative."""
    if not bool((stored.isfinite() & (stored >= 0)).all()):
        raise CheckpointError(
            f"{piece.source} has a number that is negative or not finite; fetch the checkpoint again"
        )
    if len(piece.shape) == 1:
        return stored.float().view(())
    experts, half = piece.index
    of_halves = stored.float().view(piece.shape[0], -1).expand(piece.shape)
    return of_halves[experts, half, None]


def _hold_codes(model: Qwen3Model, pieces: Sequence[Piece]) -> None:
    """Makes the quantised weights of a model on meta ones of codes. Raises CheckpointError if experts of a layer
    differ in their format."""
    held: set[str] = set()
    of_experts: dict[str, tuple[str | None, tuple[str, ...]]] = {}
    for piece in pieces:
        if piece.stored in COMPANIONS:
            continue
        module, _, name = piece.parameter.rpartition(".")
        form = (piece.stored, piece.companions)
        if module.endswith(".experts") and of_experts.setdefault(module, form) != form:
            raise CheckpointError(
                f"{piece.source} is not stored as other weights of its layer's experts are; all must have one format"
            )
        if piece.stored is not None and piece.grid is not None and piece.parameter not in held:
            holder = model.get_submodule(module)
            assert isinstance(holder, Quantizable)
            dtype = torch.uint8 if piece.stored in NIBBLES else getattr(torch, piece.stored)
            holder.hold_codes(name, Codes(dtype, piece.grid, piece.companions))
            held.add(piece.parameter)


def _materialise(model: Qwen3Model, modules: Iterable[nn.Module], device: torch.device) -> dict[str, Tensor]:
    """Allocates zeroed storage for the own meta parameters of `modules`. Tied parameters share theirs. Returns the
    tensors by their names in `model`."""
    made: dict[int, nn.Parameter] = {}
    for module in modules:
        for name, old in module.named_parameters(recurse=False):
            if id(old) not in made:
                storage = zeros(old.shape, old.dtype, device)
                made[id(old)] = nn.Parameter(storage, requires_grad=False)
            setattr(module, name, made[id(old)])
    new = {*map(id, made.values())}
    return {name: each.data for name, each in model.named_parameters() if id(each) in new}


def _may_be_padding(name: str) -> bool:
    """Whether a parameter may consist of padding only: biases that only tp rank 0 has, outputs or columns past the
    end."""
    return ".out_proj." in name or ".fc" in name or name in ("tok_emb.weight", "out_head.weight")
