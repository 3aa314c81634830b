"""The setting of speculative decoding, written `ngram,k=4`. Values validate themselves."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qwen3_dist.errors import ConfigError

MOST_DRAFTED = 32


@dataclass(frozen=True)
class Speculation:
    """Prompt lookup (arXiv 2304.04487): if the last `min` to `max` tokens occurred in the sequence before, up to `k`
    of the tokens that followed are the draft.

    `Speculation.parse` is the inverse of `str`.
    """

    k: int = 8
    min: int = 2
    max: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.k <= MOST_DRAFTED:
            raise ConfigError(f"speculative k={self.k} must lie between 1 and {MOST_DRAFTED}")
        if not 1 <= self.min <= self.max:
            raise ConfigError(f"speculative min={self.min} must lie between 1 and max={self.max}")

    @classmethod
    def parse(cls, text: str | Speculation) -> Speculation:
        """Reads `ngram,k=4,min=2,max=4`; all parts after `ngram` are optional. Raises ConfigError."""
        if isinstance(text, Speculation):
            return text
        method, *parts = (part.strip() for part in str(text).split(","))
        if method != "ngram":
            raise ConfigError(f"speculative must be ngram, for example ngram,k=4, not {text!r}")
        sizes: dict[str, int] = {}
        for part in parts:
            match = re.fullmatch(r"(k|min|max)\s*=\s*(\d{1,9})", part)
            if not match or match[1] in sizes:
                raise ConfigError(
                    f"speculative {text!r} has {part!r} where k=N, min=N or max=N (each once) is expected"
                )
            sizes[match[1]] = int(match[2])
        return cls(**sizes)

    def __str__(self) -> str:
        return f"ngram,k={self.k},min={self.min},max={self.max}"
