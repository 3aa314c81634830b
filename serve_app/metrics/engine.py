"""A replica's metrics: its engine's state and totals beside what was recorded of its requests."""

from __future__ import annotations

import asyncio
import contextlib
import time

from qwen3_dist.engine.async_engine import AsyncEngine
from qwen3_dist.errors import QwenDistError
from serve_app.metrics import definitions as names
from serve_app.metrics.definitions import VLLM_PREFIX
from serve_app.metrics.requests import RequestMetrics
from serve_app.metrics.values import Snapshot, Values

_ASK_EVERY_S = 10.0
_ANSWER_TIMEOUT_S = 0.5


class EngineMetrics:
    """The metrics of one engine, which answers as `model_name` in the Serve replica `replica`."""

    def __init__(self, engine: AsyncEngine, model_name: str, replica: str, prefix: str = VLLM_PREFIX) -> None:
        self._prefix = prefix
        self._engine = engine
        self._labels = {"model_name": model_name, "engine": "0", "replica": replica}
        self.values = Values()
        self.requests = RequestMetrics(self.values)
        self._next_question_s = 0.0
        config = engine.config
        self.values.set(
            names.CACHE_CONFIG,
            1.0,
            str(config.block_size),
            engine.kv_cache_dtype,
            str(config.prefix_caching),
            f"{config.gpu_memory_utilization:g}",
            str(engine.stats().total_blocks),
        )
        self.values.set(names.NUM_SWAPPED, 0.0)

    async def read(self) -> Snapshot:
        """All metrics of the replica now."""
        self._read_engine()
        await self._ask_ranks()
        return self.values.snapshot(self._labels, self._prefix)

    def _read_engine(self) -> None:
        stats, values, absence = self._engine.stats(), self.values, self._engine.absence
        queries = stats.prompt_tokens if self._engine.config.prefix_caching else 0
        for definition, value in (
            (names.NUM_RUNNING, stats.num_running),
            (names.NUM_WAITING, stats.num_waiting),
            (names.KV_USAGE, stats.kv_usage),
            (names.PREFIX_QUERIES, queries),
            (names.PREFIX_HITS, stats.cached_prompt_tokens),
            (names.PROMPT_TOKENS, stats.prompt_tokens),
            (names.GENERATION_TOKENS, stats.generation_tokens),
            (names.PREEMPTIONS, stats.preemptions),
            (names.DRAFT_TOKENS, stats.drafted_tokens),
            (names.ACCEPTED_TOKENS, stats.accepted_tokens),
            (names.STEPS, stats.steps),
            (names.RANK_REPLACEMENTS, self._ranks_replaced()),
            (names.RANKS_ABSENT, len(absence.ranks) if absence else 0),
            (names.REPEATED_STEPS, stats.repeated_steps),
            (names.STEP_SEQUENCES, stats.scheduled_sequences),
            (names.STEP_TOKENS, stats.computed_tokens),
            (names.LAST_STEP_SEQUENCES, stats.last_step_sequences),
            (names.LAST_STEP_TOKENS, stats.last_step_tokens),
            (names.STEP_AGE, self._engine.step_age_s),
            (names.DISPATCHED_TOKENS, stats.dispatched_tokens),
        ):
            values.set(definition, float(value))
        values.set(names.WIRE_BYTES, stats.tensor_bytes, "tensor")
        values.set(names.WIRE_BYTES, stats.expert_bytes, "experts")
        values.set(names.WIRE_BYTES, stats.pipeline_bytes, "pipeline")
        values.set(names.RANK_WAIT, stats.wait_for_requests_s, "requests")
        values.set(names.RANK_WAIT, stats.wait_for_engine_s, "engine")
        values.forget(names.WEIGHTS)
        values.set(names.WEIGHTS, 1.0, self._engine.config.weights.version)
        for level, state in enumerate(("awake", "weights_offloaded", "discard_all")):
            values.set(names.SLEEP_STATE, float(self._engine.asleep == level), state)
        adapters = self._engine.config.lora.names
        if adapters:
            running, waiting = self._engine.adapters_in_use()
            values.forget(names.LORA_REQUESTS)
            values.set(
                names.LORA_REQUESTS, time.time(), str(len(adapters)), ",".join(running), ",".join(waiting)
            )

    def _ranks_replaced(self) -> int:
        return sum(len(each.ranks) for each in self._engine.recoveries if each.change == "replaced")

    async def _ask_ranks(self) -> None:
        """Asks the ranks for their experts' load and their pace, which they tell between two steps, now and then."""
        layout = self._engine.config.layout
        if layout.world == 1 or time.monotonic() < self._next_question_s:
            return
        self._next_question_s = time.monotonic() + _ASK_EVERY_S
        with contextlib.suppress(TimeoutError, QwenDistError):  # the step is long, or the engine has died
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                pace = await self._engine.rank_pace()
                for rank, seconds in enumerate(pace.total_s if pace else ()):
                    self.values.set(names.RANK_OWN, seconds, str(rank))
                if layout.ep == 1:
                    return
                load = await self._engine.expert_load()
                for layer, imbalance in load.imbalance.items():
                    self.values.set(names.EXPERT_IMBALANCE, imbalance, str(layer))
