"""Fills a rank's model from its own slices of a checkpoint, and checks that no tensor is missing or left over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from qwen3_dist.config import ModelConfig
from qwen3_dist.errors import CheckpointError
from qwen3_dist.expert_placement import Placements
from qwen3_dist.model.experts import ExpertShape
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.ops.base import Ops
from qwen3_dist.ops.choose import choose_ops
from qwen3_dist.ops.host_memory import zeros
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.protocol.messages import Progress
from qwen3_dist.weights import random_weights
from qwen3_dist.weights.files import CheckpointFiles
from qwen3_dist.weights.weight_plan import Piece, WeightPlan


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
    """Builds this rank's shard on `device`. Padding is zero. With `random`, weights need no checkpoint. `ops` are by
    default those of `choose_ops`.

    Raises CheckpointError with the names of tensors that are missing, left over or do not have the shape of `config`.
    """
    files = None if random else CheckpointFiles(path)
    if (
        files and files.is_headless
    ):  # an embedding model: its head is never used, so it is tied to the embedding
        config = replace(config, tie_word_embeddings=True)
    names = files.names() if files else set()
    plan = WeightPlan(config, parallel.layout, names, placements, parallel.deterministic)
    if files:
        _check_names(path, files, plan)
    ops = ops or choose_ops(device, dtype)
    with torch.device("meta"):
        model = Qwen3Model(config, parallel, ops, placements).to(dtype).eval().requires_grad_(False)
    parameters = _materialise(model, device)
    pieces = list(plan.pieces(parallel.coords))
    total = sum(parameters[piece.parameter][piece.target].numel() for piece in pieces) * dtype.itemsize
    done = 0

    def advance(elements: int) -> None:
        nonlocal done
        done += elements * dtype.itemsize
        if progress:
            progress(done, total)

    for piece in pieces:
        _read(files, piece, parameters, advance)
    filled = {piece.parameter for piece in pieces}
    unfilled = [name for name in parameters if name not in filled and not _may_be_padding(name)]
    assert not unfilled, f"no rule fills {unfilled}"
    return model


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
        self, layer: int, experts: Sequence[int], progress: Callable[[int], None] = lambda elements: None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns fc1 and fc2 [n, I, D] and fc3 [n, D, I] of `experts` of a layer, on the CPU.

        Random weights are generated on the model's device, with the same values as at loading. `progress` is called
        with numbers of elements that were read. Raises CheckpointError or OSError.
        """
        parallel = self._model.parallel
        shape = ExpertShape.of(self._model.config, parallel)
        device = self._model.device if self._random else "cpu"
        stacks = {
            name: torch.zeros(len(experts), *sizes, dtype=self._model.dtype, device=device)
            for name, sizes in zip(("fc1", "fc2", "fc3"), shape.matrices, strict=True)
        }
        if experts:
            for piece in self._plan.expert_pieces(layer, experts, parallel.coords):
                _read(self._files, piece, stacks, progress)
        return stacks["fc1"], stacks["fc2"], stacks["fc3"]


def _read(
    files: CheckpointFiles | None,
    piece: Piece,
    parameters: dict[str, Tensor],
    advance: Callable[[int], None],
) -> None:
    view = parameters[piece.parameter][piece.target]
    if view.ndim > len(piece.shape):  # one expert's own tensor into its place in the stack
        view = view.squeeze(0)
    if files:
        _check_shape(files, piece)
        files.read(piece.source, piece.index, view, advance)
    else:
        random_weights.fill(piece, view)
        advance(view.numel())


def _materialise(model: Qwen3Model, device: torch.device) -> dict[str, Tensor]:
    """Allocates zeroed storage for all meta parameters. Tied parameters share theirs. Returns the tensors by name."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, old in module.named_parameters(recurse=False):
            if id(old) not in made:
                storage = zeros(old.shape, old.dtype, device)
                made[id(old)] = torch.nn.Parameter(storage, requires_grad=False)
            setattr(module, name, made[id(old)])
    return {name: parameter.data for name, parameter in model.named_parameters()}


def _may_be_padding(name: str) -> bool:
    """Whether a parameter may consist of padding only: biases that only tp rank 0 has, outputs or columns past the
    end."""
    return ".out_proj." in name or ".fc" in name or name in ("tok_emb.weight", "out_head.weight")


def _check_names(path: Path, files: CheckpointFiles, plan: WeightPlan) -> None:
    names, expected = files.names(), plan.expected_names()
    missing = sorted(expected - names)
    if missing:
        raise CheckpointError(f"{path} lacks {_some(missing)} that its config.json asks for")
    left_over = sorted(name for name in names - expected if not plan.ignorable(name))
    if left_over:
        raise CheckpointError(f"{path} holds {_some(left_over)} that its config.json has no place for")


def _check_shape(files: CheckpointFiles, piece: Piece) -> None:
    shape = tuple(files.shape(piece.source))
    if shape != piece.shape:
        raise CheckpointError(
            f"{piece.source} has shape {list(shape)} where config.json makes it {list(piece.shape)}"
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{len(names)} tensors ({shown}{', ...' if len(names) > 5 else ''})"
