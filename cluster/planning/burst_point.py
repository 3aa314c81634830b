"""The workload of a benchmark run: prompts of one length that all arrive at once."""

from __future__ import annotations

from dataclasses import dataclass

from qwen3_dist.errors import ConfigError


@dataclass(frozen=True)
class BurstPoint:
    """`num_prompts` prompts of `input_len` tokens at once, with `output_len` output tokens each."""

    num_prompts: int
    input_len: int
    output_len: int

    def __post_init__(self) -> None:
        for name in ("num_prompts", "input_len", "output_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}")

    def __str__(self) -> str:
        return f"{self.num_prompts}×({self.input_len}→{self.output_len})"
