"""The pieces of quantised weights: a rank reads its part of the codes, and the scales of all blocks that cover it.

A block at the edge of a part is shared: each rank has its whole scale, and `Piece.grid` says where in it the part
begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import replace

from qwen3_dist.quantization import Grid, Quantization, WeightFormat
from qwen3_dist.weights.pieces import SCALE, Piece

_QUANTIZABLE = ("_proj.weight", ".experts.gate_up_proj", ".experts.down_proj")


def with_scales(piece: Piece, quantization: Quantization | None, names: Set[str]) -> Iterator[Piece]:
    """`piece`, and if it is of a quantised weight the piece of its scales, if the part is not empty. `names` are the
    tensors of the checkpoint."""
    weight_format = None
    if quantization is not None and piece.source.endswith(_QUANTIZABLE):
        weight_format = quantization.of(piece.source.removesuffix(".weight"))
    if weight_format is None:
        yield piece
        return
    *_, rows, columns = piece.ranges
    rounds = _matrix(piece) if quantization is not None and quantization.rounds else None
    if rounds is not None:
        rows = range(rows.start - rounds.start, rows.stop - rounds.start)
    grid = weight_format.grid(rows.start, columns.start)
    yield replace(piece, stored=weight_format.codes, grid=grid, rounds=rounds)
    if not piece.is_empty:
        name = piece.source if rounds else _scale_name(piece, weight_format, names)
        yield replace(_scales(piece, rows, columns, grid, name), rounds=rounds)


def _matrix(piece: Piece) -> range:
    """The rows of the source that are one matrix: all, or a half of fused gates and ups."""
    outputs, first = piece.shape[-2], piece.ranges[-2].start
    if not piece.source.endswith("gate_up_proj"):
        return range(outputs)
    return range(outputs // 2) if first < outputs // 2 else range(outputs // 2, outputs)


def _scales(piece: Piece, rows: range, columns: range, grid: Grid, name: str) -> Piece:
    tall, wide = grid.shape(len(rows), len(columns))
    top, left = rows.start // grid.rows, columns.start // grid.columns
    lead = len(piece.shape) - 2
    index = (*piece.index[:lead], slice(top, top + tall), slice(left, left + wide))
    shape = (*piece.shape[:-2], *Grid(grid.rows, grid.columns).shape(*piece.shape[-2:]))
    places = piece.target[:1] if len(piece.target) > 2 else ()  # experts in their stack
    target = (*places, slice(0, tall), slice(0, wide))
    return Piece(name, shape, index, f"{piece.parameter}_scale", target, SCALE, grid)


def _scale_name(piece: Piece, weight_format: WeightFormat, names: Set[str]) -> str:
    possible = [f"{piece.source.removesuffix('weight')}{end}" for end in weight_format.scale_names]
    if not piece.source.endswith(".weight"):  # fused experts
        possible = [f"{piece.source}{end.removeprefix('weight')}" for end in weight_format.scale_names]
    return next((name for name in possible if name in names), possible[0])
