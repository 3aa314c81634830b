"""Reads an engine's statistics from its schedulers and its step meter. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Sequence as Items

from qwen3_dist.engine.scheduler import Scheduler
from qwen3_dist.engine.scheduler_counts import SchedulerCounts
from qwen3_dist.engine.step_meter import StepMeter
from qwen3_dist.percentiles import percentile
from qwen3_dist.protocol.outputs import EngineLoad, EngineStats


def read_stats(groups: Items[Scheduler], meter: StepMeter, steps: int, repeated_steps: int) -> EngineStats:
    """The statistics now, of all dp groups together. Called after every step, so it is cheap."""
    counts = [group.counts for group in groups]
    traffic = meter.traffic.total
    return EngineStats(
        num_running=sum([len(group.running) for group in groups]),
        num_waiting=sum([len(group.waiting) for group in groups]),
        free_blocks=sum([group.blocks.num_free for group in groups]),
        cached_blocks=sum([group.blocks.num_cached for group in groups]),
        total_blocks=sum([group.blocks.num_blocks for group in groups]),
        steps=steps,
        repeated_steps=repeated_steps,
        scheduled_sequences=sum([count.scheduled_sequences for count in counts]),
        preemptions=sum([count.preemptions for count in counts]),
        prompt_tokens=sum([count.prompt_tokens for count in counts]),
        cached_prompt_tokens=sum([count.cached_prompt_tokens for count in counts]),
        drafted_tokens=sum([count.drafted_tokens for count in counts]),
        accepted_tokens=sum([count.accepted_tokens for count in counts]),
        generation_tokens=sum([count.generation_tokens for count in counts]),
        computed_tokens=meter.computed_tokens,
        last_step_tokens=meter.last_tokens,
        last_step_sequences=meter.last_sequences,
        dispatched_tokens=traffic.dispatched_tokens,
        tensor_bytes=traffic.tensor_bytes,
        expert_bytes=traffic.expert_bytes,
        pipeline_bytes=traffic.pipeline_bytes,
        wait_for_requests_s=meter.wait_for_requests_s,
        wait_for_engine_s=meter.wait_for_engine_s,
    )


def counts_of_groups(counts: Items[SchedulerCounts], groups: int) -> list[SchedulerCounts]:
    """The counts of so many dp groups, with the same totals as those of the groups before."""
    kept = [SchedulerCounts(**vars(each)) for each in counts[:groups]]
    for each in counts[groups:]:
        for name, count in vars(each).items():
            setattr(kept[0], name, getattr(kept[0], name) + count)
    return [*kept, *(SchedulerCounts() for _ in range(groups - len(kept)))]


def read_load(groups: Items[Scheduler]) -> EngineLoad:
    """What waits and runs now. May be called from any thread."""
    waiting = [sequence for group in groups for sequence in tuple(group.waiting)]
    running = [sequence for group in groups for sequence in tuple(group.running)]
    now = time.monotonic()
    waits_s = sorted(now - sequence.arrival_s for sequence in waiting if not sequence.scheduled_s)
    return EngineLoad(
        sum(sequence.num_tokens - sequence.num_computed for sequence in waiting),
        sum(sequence.num_tokens for sequence in running),
        sum(group.blocks.capacity_tokens for group in groups),
        percentile(waits_s, 50) if waits_s else 0.0,
    )


def adapters_in_use(groups: Items[Scheduler], names: Items[str]) -> tuple[list[str], list[str]]:
    """Of the adapters `names`: those of running and those of waiting sequences, in the order of `names`. May be called
    from any thread."""
    found = []
    for queues in ([group.running for group in groups], [group.waiting for group in groups]):
        numbers = {sequence.adapter for queue in queues for sequence in tuple(queue)}
        found.append([name for number, name in enumerate(names, 1) if number in numbers])
    running, waiting = found
    return running, waiting
