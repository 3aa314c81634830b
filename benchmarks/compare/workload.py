"""The workload of every system."""

from __future__ import annotations

import random
from typing import Any

from cluster.planning.burst_point import BurstPoint


class Row(BurstPoint):
    """A burst of random prompts, generated without stopping at EOS."""

    @property
    def is_prefill(self) -> bool:
        return self.output_len == 1

    def rate(self, seconds: float) -> float:
        """Output tokens per second; for prefill rows, prompt tokens per second."""
        return self.num_prompts * (self.input_len if self.is_prefill else self.output_len) / seconds


ROWS = (Row(1, 32, 64), Row(8, 32, 64), Row(16, 128, 64), Row(4, 1024, 1))


def make_work(repeats: int, vocab_size: int, threads: int) -> dict[str, Any]:
    """The input of a driver, to be written as JSON: rows with prompts of token ids, different in each repeat."""
    rng = random.Random(0)

    def prompts(row: Row) -> list[list[int]]:
        tokens = range(1000, min(100_000, vocab_size))
        return [rng.choices(tokens, k=row.input_len) for _ in range(row.num_prompts)]

    rows = [
        {"row": str(row), "output_len": row.output_len, "prompts": [prompts(row) for _ in range(repeats)]}
        for row in ROWS
    ]
    return {"rows": rows, "threads": threads, "max_model_len": 2048, "first": prompts(Row(1, 8, 1))}
