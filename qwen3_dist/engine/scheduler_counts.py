"""What a scheduler counts. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class SchedulerCounts:
    """Totals since the start."""

    steps: int = 0
    scheduled_sequences: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    drafted_tokens: int = 0  # that were verified
    accepted_tokens: int = 0
    generation_tokens: int = 0  # sampled and kept
