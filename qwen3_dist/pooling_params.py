"""Parameters of pooling requests, validated at construction."""

from __future__ import annotations

from dataclasses import dataclass

from qwen3_dist.errors import RequestError


@dataclass(frozen=True)
class PoolingParams:
    """A pooling request returns the hidden state of the last token after the final norm: an embedding of the prompt.

    The vector is cut to its first `dimensions` numbers, if given (Matryoshka, arXiv 2205.13147), and then scaled to
    length 1 if `normalize`. With `logits_of` the vector is the logits of these tokens after the prompt instead, with
    `score` the output of the model's score head.
    """

    dimensions: int | None = None
    normalize: bool = True
    logits_of: tuple[int, ...] = ()
    score: bool = False

    def __post_init__(self) -> None:
        dimensions = self.dimensions
        is_count = isinstance(dimensions, int) and not isinstance(dimensions, bool) and dimensions > 0
        if dimensions is not None and not is_count:
            raise RequestError(
                f"dimensions must be an integer of at least 1, not {dimensions!r}", param="dimensions"
            )
