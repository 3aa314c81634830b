"""The pieces of quantised weights: a rank reads its part of the codes, and the scales of all blocks that cover it.

A block at the edge of a part is shared: each rank has its whole scale, and `Piece.grid` says where in it the part
begins. Where inputs name their groups, a rank has the scales of all groups, and the names of its own inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import replace

from qwen3_dist.errors import CheckpointError
from qwen3_dist.quantization import Grid, Quantization, Stored, WeightFormat
from qwen3_dist.weights.pieces import DIVISOR, MULTIPLIER, ORDER, SCALE, ZERO, Piece

_QUANTIZABLE = ("_proj.weight", ".experts.gate_up_proj", ".experts.down_proj")


def with_scales(piece: Piece, quantization: Quantization | None, names: Set[str]) -> Iterator[Piece]:
    """`piece`, and if it is of a quantised weight the pieces of what belongs to its codes, if the part is not empty.
    `names` are the tensors of the checkpoint."""
    weight_format = format_of(piece.source, quantization, names)
    if weight_format is None:
        yield piece
        return
    *_, rows, columns = piece.ranges
    rounds = _matrix(piece) if quantization is not None and quantization.rounds else None
    if rounds is not None:
        rows = range(rows.start - rounds.start, rows.stop - rounds.start)
    grid = weight_format.grid(rows.start, columns.start, piece.shape[-1])
    yield replace(
        piece,
        source=piece.source if rounds else stored_name(piece.source, weight_format.weight, names),
        stored=weight_format.codes,
        grid=grid,
        rounds=rounds,
        packing=weight_format.weight.packing,
        companions=weight_format.companions,
    )
    if piece.is_empty:
        return
    for each in _companions(piece, weight_format, rows, grid, names):
        yield replace(each, source=piece.source, rounds=rounds) if rounds else each


def is_quantizable(source: str) -> bool:
    """Whether `source` is a weight of a linear layer or of stacked experts."""
    return source.endswith(_QUANTIZABLE)


def format_of(source: str, quantization: Quantization | None, names: Set[str]) -> WeightFormat | None:
    """The format of a weight by its name in a plain checkpoint; None: it is not quantised.

    Tools read lists of modules by different rules, so the checkpoint's tensors decide: a weight whose codes or scales
    are not there, but it is, is not quantised, and one that has both is quantised. Raises CheckpointError for fused
    experts in a format without them.
    """
    if quantization is None or not is_quantizable(source):
        return None
    module = source.removesuffix(".weight")
    found = quantization.of(module)
    form = found or quantization.of(module, listed=False)
    if form is not None and names and not quantization.rounds:
        if all(stored_name(source, each, names) in names for each in (form.weight, form.scale)):
            found = form
        elif source in names:
            return None
    if found is None:
        return None
    packing = found.weight.packing
    if packing is not None and packing.transposed and not source.endswith(".weight"):
        raise CheckpointError(
            f"{source} has all experts of a layer in one tensor, which is not supported with {quantization.method}; "
            "take a checkpoint with tensors for each expert, as AutoAWQ and GPTQModel write them"
        )
    return found


def _matrix(piece: Piece) -> range:
    """The rows of the source that are one matrix: all, or a half of fused gates and ups."""
    outputs, first = piece.shape[-2], piece.ranges[-2].start
    if not piece.source.endswith("gate_up_proj"):
        return range(outputs)
    return range(outputs // 2) if first < outputs // 2 else range(outputs // 2, outputs)


def _companions(
    piece: Piece, weight_format: WeightFormat, rows: range, grid: Grid, names: Set[str]
) -> Iterator[Piece]:
    """`rows` are those of the piece, counted from the first of its matrix."""
    columns = piece.ranges[-1]
    tall, wide = grid.shape(len(rows), len(columns))
    top, left = rows.start // grid.rows, 0 if grid.groups else columns.start // grid.columns
    lead = len(piece.shape) - 2
    index = (*piece.index[:lead], slice(top, top + tall), slice(left, left + wide))
    shape = (*piece.shape[:-2], *Grid(grid.rows, grid.columns).shape(*piece.shape[-2:]))
    places = piece.target[:1] if len(piece.target) > 2 else ()  # experts in their stack
    target = (*places, slice(0, tall), slice(0, wide))
    for kind, stored in ((SCALE, weight_format.scale), (ZERO, weight_format.zero)):
        if stored is not None:
            name = stored_name(piece.source, stored, names)
            parameter = f"{piece.parameter}_{kind}"
            yield Piece(name, shape, index, parameter, target, kind, grid, packing=stored.packing)
    if weight_format.factor is not None:
        name = stored_name(piece.source, weight_format.factor, names)
        kind = MULTIPLIER if weight_format.factor_multiplies else DIVISOR
        shape, index = (1,), (slice(None),)
        if lead:  # one for each expert, or one for its gate and one for its up
            gated = piece.source.endswith("gate_up_proj")
            half = int(gated and rows.start >= piece.shape[-2] // 2)
            shape, index = (piece.shape[0], 2 if gated else 1), (piece.index[0], slice(half, half + 1))
        yield Piece(name, shape, index, f"{piece.parameter}_{SCALE}", target, kind, grid)
    if weight_format.order is not None:
        index = (*piece.index[:lead], slice(columns.start, columns.stop))
        target = (*places, slice(0, len(columns)))
        name = stored_name(piece.source, weight_format.order, names)
        shape = (*piece.shape[:-2], piece.shape[-1])
        yield Piece(name, shape, index, f"{piece.parameter}_{ORDER}", target, ORDER, grid)


def stored_name(source: str, stored: Stored, names: Set[str]) -> str:
    """The name of a tensor of the quantised weight `source`, of which `names` may have one of several spellings."""
    if source.endswith(".weight"):
        possible = [f"{source.removesuffix('weight')}{end}" for end in stored.names]
    else:  # fused experts: of transformers, of llm-compressor, of ModelOpt
        possible = [f"{source}{end.removeprefix('weight')}" for end in stored.names]
        possible += [f"{source}{mark}{end}" for mark in (".", "_") for end in stored.names]
    return next((name for name in possible if name in names), possible[0])
