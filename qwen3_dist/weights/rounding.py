"""Reads plain weights as codes, fp8 or int4, and the scales of their blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3_dist.ops.quantize import INT4_GROUP, TILE, as_fp8, as_int4, packed
from qwen3_dist.quantization import INT4, Grid
from qwen3_dist.weights.files import CheckpointFiles
from qwen3_dist.weights.pieces import Piece


def read_rounded(files: CheckpointFiles, piece: Piece, codes: Tensor, scales: Tensor) -> None:
    """Fills `codes`, the part of a rank's parameter that is for `piece`, and the places in `scales`, the parameter of
    its blocks' scales, that go with it.

    Reads whole blocks, also where the part has some of their rows and columns only: so codes and scales do not depend
    on the layout. Codes of 4 bits are packed from the part's first input on.
    """
    assert piece.grid is not None and piece.rounds is not None
    *lead, rows, columns = piece.ranges
    matrix, grid, inputs = piece.rounds, piece.grid, piece.shape[-1]
    left = columns.start - grid.first_column
    width = min(inputs, -(-columns.stop // grid.columns) * grid.columns) - left
    top = rows.start - grid.first_row
    bottom = min(matrix.stop, matrix.start + -(-(rows.stop - matrix.start) // grid.rows) * grid.rows)
    step = max(1, TILE // (width * grid.rows)) * grid.rows
    within = slice(grid.first_column, grid.first_column + len(columns))
    stacked = codes if codes.ndim == 3 else codes[None]
    places = scales[piece.target[0]] if scales.ndim == 3 else scales[None]
    for expert, (of_codes, of_scales) in enumerate(zip(stacked, places, strict=True)):
        index = (slice(lead[0][expert], lead[0][expert] + 1),) if lead else ()
        for first in range(top, bottom, step):
            last = min(first + step, bottom)
            wide = torch.empty(last - first, width, dtype=torch.float32, device=codes.device)
            region = (*index, slice(first, last), slice(left, left + width))
            files.read(piece.source, region, wide[None] if lead else wide)
            made, blocks = _rounded(wide, grid)
            block = (first - top) // grid.rows
            of_scales[block : block + len(blocks), : blocks.shape[1]].copy_(blocks)
            begin, end = max(first, rows.start), min(last, rows.stop)
            part = made[begin - first : end - first, within]
            of_codes[begin - rows.start : end - rows.start].copy_(packed(part) if grid.nibbles else part)


def _rounded(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Codes [N, D] of whole blocks of a weight fp32 [N, D], and their scales."""
    if grid.nibbles is None:
        return as_fp8(weight, grid.rows, grid.columns)
    assert (grid.nibbles, grid.rows, grid.columns) == (INT4, 1, INT4_GROUP)
    return as_int4(weight)
