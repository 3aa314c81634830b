"""What a caller may ask of a prompt in place of text that goes on from it; validated once, at construction."""

from __future__ import annotations

from dataclasses import dataclass

from qwen3_dist.errors import RequestError


@dataclass(frozen=True)
class PoolingParams:
    """The last token's hidden state after the final norm: an embedding of the prompt.

    It is cut to its first `dimensions` numbers where given (Matryoshka, arXiv 2205.13147) and then, if
    `normalize`, scaled to length 1. With `logits_of` it is the logits of those tokens after the prompt instead.
    """

    dimensions: int | None = None
    normalize: bool = True
    logits_of: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        dimensions = self.dimensions
        is_count = isinstance(dimensions, int) and not isinstance(dimensions, bool) and dimensions > 0
        if dimensions is not None and not is_count:
            raise RequestError(
                f"dimensions must be an integer of at least 1, not {dimensions!r}", param="dimensions"
            )
