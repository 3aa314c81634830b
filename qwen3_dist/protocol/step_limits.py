"""How large a step may be, and how far ahead the scheduler may go. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from qwen3_dist.settings import EngineConfig
from qwen3_dist.speculation import Speculation

TOKENS_PER_SEQ = 128


@dataclass(frozen=True)
class SchedulerLimits:
    """Most sequences and tokens of one step, the stages that steps pass through, and how to guess ahead."""

    max_num_seqs: int
    max_num_batched_tokens: int
    stages: int = 1
    speculation: Speculation | None = None
    free_tokens: int = 8  # whose computing takes as long as reading the weights for a step
    may_repeat: bool = False  # whether a step may turn out void, so that it and those after it are run again

    @classmethod
    def of(
        cls, config: EngineConfig, device: str, num_blocks: int, may_repeat: bool = False
    ) -> SchedulerLimits:
        """What `config` says; where it says nothing, what suits `device` and a cache of `num_blocks`.

        A GPU wants large steps; on a CPU a step of many prompt tokens holds up every decode for seconds,
        which where nobody waits for single tokens is as well. Sequences are few enough to have
        TOKENS_PER_SEQ of the cache each. The free tokens are measured on a CPU (Qwen3-0.6B's shape in
        bf16, a draw after each); those of a GPU are by its rates.
        """
        seqs, tokens, free = (256, 8192, 128) if device == "cuda" else (64, 1024, 8)
        if config.performance_mode == "throughput":
            tokens = 16384 if device == "cuda" else 4096
        fitting = max(1, num_blocks * config.block_size // TOKENS_PER_SEQ)
        most = config.max_num_seqs or min(seqs, fitting)
        tokens = config.max_num_batched_tokens or tokens
        return cls(most, tokens, config.layout.pp, config.speculative, free, may_repeat)
