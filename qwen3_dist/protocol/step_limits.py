"""The scheduler's limits for one step. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from qwen3_dist.settings import EngineConfig
from qwen3_dist.speculation import Speculation
from qwen3_dist.step_defaults import STEP_DEFAULTS

TOKENS_PER_SEQ = 128


@dataclass(frozen=True)
class SchedulerLimits:
    """The most sequences and tokens of a step, the number of pipeline stages, and speculative decoding."""

    max_num_seqs: int
    max_num_batched_tokens: int
    stages: int = 1
    speculation: Speculation | None = None
    free_tokens: int = STEP_DEFAULTS["cpu"].free_tokens
    may_repeat: bool = False  # whether steps may overflow and run again

    @classmethod
    def of(
        cls, config: EngineConfig, device: str, num_blocks: int, may_repeat: bool = False
    ) -> SchedulerLimits:
        """The limits that `config` sets; by `device` and a cache of `num_blocks` where it leaves them open.

        By default sequences are few enough for each to have TOKENS_PER_SEQ of the cache.
        """
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
