"""Sizes of a step where the settings leave them open. Imports no torch."""

from __future__ import annotations

from typing import NamedTuple


class StepDefaults(NamedTuple):
    """`throughput_tokens` replaces `max_num_batched_tokens` in performance_mode=throughput. `free_tokens` take as long
    to compute as a step takes to read the weights: measured on a CPU (Qwen3-0.6B's shape in bf16, a draw after each),
    by its rates on a GPU."""

    max_num_seqs: int
    max_num_batched_tokens: int
    throughput_tokens: int
    free_tokens: int


# A GPU wants large steps. On a CPU a step of many prompt tokens holds up every decode for seconds, which does not
# matter if nobody waits for single tokens.
STEP_DEFAULTS = {"cuda": StepDefaults(256, 8192, 16384, 128), "cpu": StepDefaults(64, 1024, 4096, 8)}
