"""How many replicas a model's load asks for, beside the requests in flight. Runs in Ray Serve's controller.

Each replica reports its loads as shares of their targets. So the policy has no parameters: Serve would load the model
again if they changed. Serve pickles this module by value, so it imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingContext

TOKENS, KV_USAGE, TTFT = "share_of_tokens", "share_of_kv_usage", "share_of_ttft"
_MOST_FACTOR = 2.0  # a high TTFT asks for at most this many times the replicas that run
_KEPT_FROM = 0.5  # of its target: from there on the TTFT asks for the replicas that run


def load_policy(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Serve's policy: the most replicas that a load or the requests in flight ask for.

    Serve itself averages what replicas report, applies the delays and keeps to the bounds.
    """
    for_requests, _ = replica_queue_length_autoscaling_policy(context)
    reports = context.aggregated_metrics or {}
    shares = {name: tuple(reports.get(name, {}).values()) for name in (TOKENS, KV_USAGE, TTFT)}
    return max(for_requests, replicas_wanted(shares, context.current_num_replicas)), {}


def replicas_wanted(shares: Mapping[str, Collection[float]], running: int) -> float:
    """The most replicas that a load asks for while `running` replicas run; 0 if none has a target.

    `shares` has what the replicas reported, by the name of the load.

    - TOKENS and KV_USAGE add up: as many replicas as bring each to its target.
    - TTFT, 0 without requests, is averaged. Above its target it asks for more replicas in proportion, but for no more
      than twice as many; from half of it on for those that run; below, for none.
    """
    ttfts = shares.get(TTFT, ())
    factor = _ttft_factor(sum(ttfts) / len(ttfts)) if ttfts else 0.0
    return max(running * factor, sum(shares.get(TOKENS, ())), sum(shares.get(KV_USAGE, ())))


def _ttft_factor(share: float) -> float:
    if share < _KEPT_FROM:
        return 0.0
    return min(max(1.0, share), _MOST_FACTOR)
