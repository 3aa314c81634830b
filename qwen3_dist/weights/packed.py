"""Reads numbers that a quantised checkpoint packs in words, or stores transposed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

from qwen3_dist.ops.quantize import packed
from qwen3_dist.quantization import NIBBLES, Packing
from qwen3_dist.weights.files import CheckpointFiles
from qwen3_dist.weights.pieces import SCALE, Piece

_PART = 1 << 22  # numbers that are read at a time
_STEP = 64  # parts begin at multiples of it, so that they cut neither words nor bytes


def read_packed(files: CheckpointFiles, piece: Piece, out: Tensor, advance: Callable[[int], None]) -> None:
    """Fills `out`, the piece's place in its parameter, with the piece's numbers, some at a time. Codes of 4 bits are
    packed anew, from the piece's first input on. `advance` is called with numbers of bytes of `out`."""
    *lead, rows, columns = piece.ranges
    for place, experts in enumerate(product(*lead)):
        own = out[place] if lead else out
        for part in _parts(piece, len(rows), len(columns)):
            view, words = _read_part(files, piece, experts, own, part)
            view.copy_(words)
            advance(view.nbytes)


def _parts(piece: Piece, outputs: int, inputs: int) -> Iterator[tuple[range, range]]:
    """The outputs and inputs of each part, counted from the piece's first."""
    assert piece.packing is not None
    if piece.packing.transposed:  # then inputs lie one after the other
        step = max(_STEP, _PART // max(1, outputs) // _STEP * _STEP)
        return ((range(outputs), range(at, min(at + step, inputs))) for at in range(0, inputs, step))
    step = max(1, _PART // max(1, inputs))
    return ((range(at, min(at + step, outputs)), range(inputs)) for at in range(0, outputs, step))


def _read_part(
    files: CheckpointFiles, piece: Piece, experts: tuple[int, ...], out: Tensor, part: tuple[range, range]
) -> tuple[Tensor, Tensor]:
    """The place of a part in `out`, and what belongs there."""
    assert piece.packing is not None
    outputs, inputs = part
    *_, rows, columns = piece.ranges
    numbers = _numbers(
        files,
        piece.source,
        experts,
        piece.packing,
        _moved(outputs, rows.start),
        _moved(inputs, columns.start),
    )
    own = out[outputs.start : outputs.stop]
    if piece.stored in NIBBLES:
        return own[:, inputs.start // 2 : -(-inputs.stop // 2)], packed(numbers)
    if numbers.dtype == torch.uint8:
        numbers = numbers.view(torch.float8_e8m0fnu if piece.stored == SCALE else torch.int8)
    return own[:, inputs.start : inputs.stop], numbers


def _moved(part: range, by: int) -> range:
    return range(part.start + by, part.stop + by)


def _numbers(
    files: CheckpointFiles, name: str, experts: tuple[int, ...], packing: Packing, rows: range, columns: range
) -> Tensor:
    """Numbers [rows, columns] of a tensor: uint8 if words hold several, else as they are stored."""
    ranges, per_word = [rows, columns], packing.per_word
    packed_range = ranges[packing.axis]
    first = packed_range.start // per_word
    ranges[packing.axis] = range(first, -(-packed_range.stop // per_word))
    index = tuple(slice(each.start, each.stop) for each in ranges)
    words = files.take(name, (*experts, *(reversed(index) if packing.transposed else index)))
    words = words.t() if packing.transposed else words
    if packing.dtype not in ("int32", "uint8"):
        return words
    before = packed_range.start - first * per_word
    numbers = _split(words, packing).narrow(packing.axis, before, len(packed_range))
    return numbers


def _split(words: Tensor, packing: Packing) -> Tensor:
    """The numbers of words [a, b], uint8 [a, b * per_word] or [a * per_word, b]."""
    per_word, mask = packing.per_word, (1 << packing.bits) - 1
    places = torch.tensor(packing.order or range(per_word), dtype=words.dtype) * packing.bits
    words = words + packing.word_plus if packing.word_plus else words
    numbers = ((words.unsqueeze(-1) >> places) + packing.plus).bitwise_and_(mask).to(torch.uint8)
    if packing.axis == 0:
        numbers = numbers.transpose(1, 2)
    return numbers.flatten(packing.axis, packing.axis + 1)
