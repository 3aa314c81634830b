"""The scheduler's limits for one step. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from qwen3_dist.settings import EngineConfig
from qwen3_dist.speculation import Speculation
from qwen3_dist.step_defaults import STEP_DEFAULTS

TOKENS_PER_SEQ = 128


@dataclass(frozen=True)
class SchedulerLimits:
    """The limits of a step on sequences and tokens, with the settings that they depend on."""

    max_num_seqs: int
    max_num_batched_tokens: int
    stages: int = 1
    speculation: Speculation | None = None
    free_tokens: int = STEP_DEFAULTS["cpu"].free_tokens
    may_repeat: bool = False  # whether steps may overflow and run again

    @property
    def max_samples(self) -> int:
        """Most tokens that a step samples: one for each sequence and for each of its draft tokens."""
        num_drafted = self.speculation.k if self.speculation is not None else 0
        return self.max_num_seqs * (1 + num_drafted)

    @property
    def max_step_tokens(self) -> int:
        """Most tokens of a step. CUDA graphs and buffers are sized by it."""
        return max(self.max_num_batched_tokens, self.max_samples)

    @classmethod
    def of(
        cls, config: EngineConfig, device: str, num_blocks: int, may_repeat: bool = False
    ) -> SchedulerLimits:
        """The limits in `config`. Limits that it leaves open follow from `device` ("cpu" or "cuda") and the KV cache:
        by default each of max_num_seqs sequences can have TOKENS_PER_SEQ tokens in `num_blocks` blocks."""
        defaults = STEP_DEFAULTS[device]
        throughput = config.performance_mode == "throughput"
        tokens = defaults.throughput_tokens if throughput else defaults.max_num_batched_tokens
        fitting = max(1, num_blocks * config.block_size // TOKENS_PER_SEQ)
        return cls(
            config.max_num_seqs or min(defaults.max_num_seqs, fitting),
            config.max_num_batched_tokens or tokens,
            config.layout.pp,
            config.speculative,
            defaults.free_tokens,
            may_repeat,
        )
