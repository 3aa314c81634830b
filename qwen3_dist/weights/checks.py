"""Checks a checkpoint's tensors against its config.json, by the headers of its files alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qwen3_dist.config import ModelConfig
from qwen3_dist.errors import CheckpointError
from qwen3_dist.layout import Layout
from qwen3_dist.quantization import FP4
from qwen3_dist.weights.files import FLOATS, CheckpointFiles
from qwen3_dist.weights.pieces import DIVISOR, MULTIPLIER, ORDER, SCALE, Piece
from qwen3_dist.weights.scale_pieces import is_quantizable
from qwen3_dist.weights.weight_plan import WeightPlan

_ADVICE = "download the weights and config.json of the same revision"


def check_checkpoint(path: Path, config: ModelConfig) -> int:
    """Checks all tensors at `path`. Returns their number, and raises CheckpointError as `load_model` does."""
    files = CheckpointFiles(path)
    if files.is_headless:
        config = replace(config, tie_word_embeddings=True)
    plan = WeightPlan(config, Layout(), files.names())
    check_names(path, files, plan)
    for piece in plan.pieces(Layout().coords(0)):
        check_tensor(files, piece)
    return len(files.names())


def check_names(path: Path, files: CheckpointFiles, plan: WeightPlan) -> None:
    """Raises CheckpointError if the checkpoint lacks a tensor, or has one that the model has no place for."""
    names, expected = files.names(), plan.expected_names()
    missing = sorted(expected - names)
    if missing:
        raise CheckpointError(f"{path} lacks {_some(missing)} that its config.json asks for; {_ADVICE}")
    left_over = sorted(name for name in names - expected if not plan.ignorable(name))
    if left_over:
        raise CheckpointError(
            f"{path} holds {_some(left_over)} that its config.json has no place for; {_ADVICE}"
        )


def check_tensor(files: CheckpointFiles, piece: Piece) -> None:
    """Raises CheckpointError if the piece's tensor has another shape or dtype than config.json makes it."""
    if piece.is_empty:
        return
    if piece.rounds is not None:
        if piece.stored == SCALE:
            return
        piece = replace(piece, stored=None)
    shape = files.shape(piece.source)
    expected = piece.packing.shape(piece.shape) if piece.packing else piece.shape
    spreads = _spreads(shape, expected) if piece.stored == SCALE else _is_short(piece, shape)
    if shape != expected and not spreads:
        raise CheckpointError(
            f"{piece.source} has shape {list(shape)} where config.json makes it {list(expected)}; {_ADVICE}"
        )
    if piece.stored is None and is_quantizable(piece.source) and files.is_code(piece.source):
        raise CheckpointError(f"the scale of {piece.source} is missing; {_ADVICE}")
    files.dtype(piece.source, _dtypes(piece))


def check_order(piece: Piece, order: Tensor) -> None:
    """Raises CheckpointError if inputs name groups that the weight does not have."""
    assert piece.grid is not None
    if order.numel() and not 0 <= int(order.min()) <= int(order.max()) < piece.grid.groups:
        raise CheckpointError(
            f"{piece.source} names groups of inputs that are not 0 to {piece.grid.groups - 1}; {_ADVICE}"
        )


def check_scales(pieces: Sequence[Piece], parameters: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError if a scale that was read is infinite or no number, which would make all outputs so."""
    for name in {piece.parameter: None for piece in pieces if piece.stored == SCALE}:
        if not _is_finite(parameters[name]):
            of_it = (each for each in pieces if each.stored == SCALE and each.parameter == name)
            piece = next(each for each in of_it if not _is_finite(parameters[name][each.place]))
            raise CheckpointError(
                f"{piece.source} has a scale that is not finite; fetch the checkpoint again"
            )


def _is_finite(numbers: Tensor) -> bool:
    """Takes no memory, of which a GPU that serves has little left: a stack of experts' scales may be half a GB."""
    return not numbers.numel() or bool(torch.stack(numbers.aminmax()).isfinite().all())


def _dtypes(piece: Piece) -> tuple[str, ...]:
    """The dtypes in which the piece's tensor may be stored."""
    if piece.stored == SCALE:
        if piece.packing is not None and piece.packing.dtype == "powers":
            return ("float8_e8m0fnu", "uint8")
        of_kind = "float8_e4m3fn" if piece.grid and piece.grid.nibbles == FP4 else "float8_e8m0fnu"
        return (*FLOATS, of_kind)
    if piece.stored in (DIVISOR, MULTIPLIER):
        return FLOATS
    if piece.stored == ORDER:
        return ("int32", "int64")
    if piece.packing is not None:
        return (piece.packing.dtype,)
    return (piece.stored,) if piece.stored else FLOATS


def _is_short(piece: Piece, shape: tuple[int, ...]) -> bool:
    """Whether `shape` is that of a factor without dimensions, or of one for each expert."""
    if piece.stored not in (DIVISOR, MULTIPLIER):
        return False
    return shape == () if len(piece.shape) == 1 else shape in (piece.shape[:1], (piece.shape[0], 1))


def _spreads(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether scales of `shape` are those of `whole` [outputs, inputs] in short: one for all, or one for each output
    without a dimension of inputs."""
    short = all(size == 1 for size in shape) or shape == whole[:1]
    return len(whole) == 2 and whole[1] == 1 and short


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown}{', ...' if len(names) > 5 else ''})"
