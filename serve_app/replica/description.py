"""What a replica tells of its engine in `/v1/cluster`."""

from __future__ import annotations

from typing import Any

from qwen3_dist.engine.async_engine import AsyncEngine


def describe_ranks(engine: AsyncEngine) -> dict[str, Any]:
    """The layout, backends, collectives and KV dtype of the engine, and the host, process and GPU of each rank."""
    return {
        "layout": str(engine.config.layout),
        "backends": engine.backends,
        "collectives": engine.collectives,
        "kv_cache_dtype": engine.kv_cache_dtype,
        "ranks": [
            {
                "rank": rank.rank,
                "host": rank.host,
                "pid": rank.pid,
                "card": {"name": rank.card.name, "uuid": rank.card.uuid} if rank.card else None,
                "memory_bytes": rank.memory_bytes,
            }
            for rank in engine.ranks
        ],
    }


def describe_load(engine: AsyncEngine) -> dict[str, Any]:
    """The engine's load, and its counters since it started."""
    stats = engine.stats()
    return {
        "num_requests_running": stats.num_running,
        "num_requests_waiting": stats.num_waiting,
        "kv_cache_usage": stats.kv_usage,
        "prompt_tokens": stats.prompt_tokens,
        "generation_tokens": stats.generation_tokens,
        "num_preemptions": stats.preemptions,
        "steps": stats.steps,
        "step_age_s": engine.step_age_s,
    }


def describe_weights(engine: AsyncEngine) -> dict[str, Any]:
    """The version and directory of the engine's weights, null for the model's own, and its level of sleep."""
    weights = engine.config.weights
    return {
        "weights": {"version": weights.version or None, "path": weights.path or None},
        "asleep": engine.asleep,
    }
