"""What a replica reports of its load for scaling."""

from __future__ import annotations

from qwen3_dist.engine.async_engine import AsyncEngine
from serve_app.metrics.requests import RequestMetrics
from serve_app.scaling import KV_USAGE, TOKENS, TTFT
from serve_app.settings import LoadTargets

_RECENT_S = 10.0


def shares_of_targets(
    targets: LoadTargets, engine: AsyncEngine, requests: RequestMetrics
) -> dict[str, float]:
    """The load as shares of the targets that are set, by the names of `serve_app/scaling.py`.

    The KV cache counts with what waiting sequences will need, so its use grows beyond 1 while it is full. The time to
    the first token is that of recent requests, or the time that those which still wait have waited, if it is longer.
    """
    load = engine.load()
    loads = (
        (TOKENS, targets.tokens, load.queued_tokens + load.running_tokens),
        (KV_USAGE, targets.kv_usage, engine.stats().kv_usage + load.queued_tokens / load.capacity_tokens),
        (TTFT, targets.ttft_s, max(requests.recent_ttft_s(_RECENT_S), load.median_wait_s)),
    )
    return {name: amount / target for name, target, amount in loads if target is not None}
