"""Schedulers and sequences for tests, small enough that blocks and budgets run out."""

from __future__ import annotations

from collections.abc import Sequence as Items

from qwen3_dist.engine.block_manager import BlockManager
from qwen3_dist.engine.scheduler import Scheduler
from qwen3_dist.engine.sequence import Sequence
from qwen3_dist.protocol.step_limits import SchedulerLimits
from qwen3_dist.sampling_params import SamplingParams
from qwen3_dist.speculation import Speculation

EOS = 0
BLOCK = 4


def make_scheduler(
    blocks: int = 64,
    block_size: int = BLOCK,
    seqs: int = 8,
    tokens: int = 16,
    caching: bool = True,
    stages: int = 1,
    speculation: Speculation | None = None,
    may_repeat: bool = False,
) -> Scheduler:
    limits = SchedulerLimits(seqs, tokens, stages, speculation, 100, may_repeat)
    return Scheduler(BlockManager(blocks, block_size, caching), limits, frozenset({EOS}))


def make_sequence(
    seq_id: int, prompt: int | Items[int], max_tokens: int = 4, priority: int = 0, **params: object
) -> Sequence:
    tokens = [100 + seq_id] * prompt if isinstance(prompt, int) else list(prompt)
    sampling = SamplingParams(**params)  # type: ignore[arg-type]
    return Sequence(seq_id, str(seq_id), 0, tokens, sampling, 0, max_tokens, priority)
