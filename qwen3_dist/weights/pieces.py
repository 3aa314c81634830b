"""`Piece`, the part of a checkpoint's tensor that a rank reads."""

from __future__ import annotations

from dataclasses import dataclass

from qwen3_dist.quantization import NIBBLES, Grid, Packing
from qwen3_dist.weights.parts import Index

# What belongs to codes: fp32 scales and int8 zeros of their blocks, and the int32 group of each input.
SCALE, ZERO, ORDER = "scale", "zero", "order"
# A number by which scales that have been read are divided, or multiplied.
DIVISOR, MULTIPLIER = "divisor", "multiplier"
COMPANIONS = (SCALE, ZERO, ORDER, DIVISOR, MULTIPLIER)


@dataclass(frozen=True)
class Piece:
    """`parameter[target] = checkpoint[source][index]`, where the whole source has shape `shape`.

    `stored`: the kind of the codes of a quantised weight, or one of COMPANIONS; None: floating-point numbers. `grid`:
    the blocks of the rank's part of a quantised weight. `rounds`: for plain weights that are rounded to codes as they
    are read, the rows of the source that are one matrix; blocks begin at the first of them. `packing`: how the numbers
    are stored, where that is not as a tensor of this shape. `companions`: those of the codes.
    """

    source: str
    shape: tuple[int, ...]
    index: Index
    parameter: str
    target: Index
    stored: str | None = None
    grid: Grid | None = None
    rounds: range | None = None
    packing: Packing | None = None
    companions: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether the rank's part is padding alone."""
        return any(part.start is not None and part.start == part.stop for part in self.index)

    @property
    def place(self) -> Index:
        """`target` in the parameter's own tensor, in which two codes of 4 bits are a byte."""
        *before, inputs = self.target
        if self.stored not in NIBBLES or len(self.target) < 2 or inputs == slice(None):
            return self.target
        return (*before, slice(0, -(-inputs.stop // 2)))

    @property
    def ranges(self) -> list[range]:
        """The indices of the rank's part along each dimension."""
        whole = slice(None)
        parts = (*self.index, *(whole for _ in self.shape[len(self.index) :]))
        return [range(*part.indices(length)) for part, length in zip(parts, self.shape, strict=True)]
