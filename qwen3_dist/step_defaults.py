"""Default limits of a step, by device. Imports no torch."""

from __future__ import annotations

from typing import NamedTuple


class StepDefaults(NamedTuple):
    """`throughput_tokens` replaces `max_num_batched_tokens` in performance_mode=throughput. Computing `free_tokens`
    tokens takes as long as reading the weights for a step: measured on a CPU (Qwen3-0.6B in bf16, with sampling),
    derived from a GPU's peak rates."""

    max_num_seqs: int
    max_num_batched_tokens: int
    throughput_tokens: int
    free_tokens: int


# A GPU is efficient with large steps. On a CPU a step of many prompt tokens delays all decodes by seconds, which only
# offline use accepts.
STEP_DEFAULTS = {"cuda": StepDefaults(256, 8192, 16384, 128), "cpu": StepDefaults(64, 1024, 4096, 8)}
