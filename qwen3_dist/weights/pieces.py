"""`Piece`, the part of a checkpoint's tensor that a rank reads."""

from __future__ import annotations

from dataclasses import dataclass

from qwen3_dist.quantization import Grid

Index = tuple[slice, ...]
SCALE = "scale"


@dataclass(frozen=True)
class Piece:
    """`parameter[target] = checkpoint[source][index]`, where the whole source has shape `shape`.

    `stored`: the dtype of the codes of a quantised weight, or SCALE for its scales; None: floating-point numbers.
    `grid`: the blocks of the rank's part of a quantised weight. `rounds`: for plain weights that are rounded to codes
    as they are read, the rows of the source that are one matrix; blocks begin at the first of them.
    """

    source: str
    shape: tuple[int, ...]
    index: Index
    parameter: str
    target: Index
    stored: str | None = None
    grid: Grid | None = None
    rounds: range | None = None

    @property
    def is_empty(self) -> bool:
        """Whether the rank's part is padding alone."""
        return any(part.start is not None and part.start == part.stop for part in self.index)

    @property
    def ranges(self) -> list[range]:
        """The indices of the rank's part along each dimension."""
        whole = slice(None)
        parts = (*self.index, *(whole for _ in self.shape[len(self.index) :]))
        return [range(*part.indices(length)) for part, length in zip(parts, self.shape, strict=True)]
