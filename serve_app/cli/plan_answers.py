"""What `qwen3-dist plan` says of the best layout beside its figures: costs, and what breaks first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.hardware import Cluster
    from cluster.planning.planner import PlannedLayout, PlanRequest
    from qwen3_dist.config import ModelConfig

_BREAKS = {
    "kv_cache": "the KV cache is full, and requests queue",
    "step_tokens": "prompts fill every step (max_num_batched_tokens)",
    "ttft": "TTFT exceeds --ttft-ms",
    "itl": "ITL exceeds --itl-ms",
}
# Layouts that are asked whether they would hold more, by their place and by their cache.
_LAYOUTS, _LARGEST_CACHES = 8, 4


def breaks_first(
    config: ModelConfig, cluster: Cluster, request: PlanRequest, planned: Sequence[PlannedLayout]
) -> dict[str, Any]:
    """What breaks first with the best layout, `planned[0]`, and the change that helps most, for `--json`."""
    from cluster.planning.breaking_point import best_change, breaking_point
    from cluster.planning.layout_loads import LayoutLoads

    best = planned[0]
    loads = LayoutLoads(config, best.layout, cluster, request)
    now = breaking_point(loads)
    fitting = [one for one in planned if one.fits]
    by_cache = sorted(fitting, key=lambda one: -one.replicas * one.max_batch)[:_LARGEST_CACHES]
    change = best_change(loads, now, [*fitting[:_LAYOUTS], *by_cache])
    found: dict[str, Any] = {
        "limit": now.limit,
        "concurrency": now.concurrency,
        "requests_per_s": round(now.requests_per_s, 3),
        "times_this_load": round(now.concurrency / best.concurrency, 3),
        "best_change": None,
    }
    if change is not None:
        found["best_change"] = {
            "setting": change.setting,
            "limit": change.then.limit,
            "concurrency": change.then.concurrency,
            "requests_per_s": round(change.then.requests_per_s, 3),
        }
    return found


def breaks_line(found: Mapping[str, Any]) -> str:
    """`breaks_first` as a sentence."""
    change = found["best_change"]
    helps = (
        f"{change['setting']} would help most: up to {change['requests_per_s']:,.1f} requests/s"
        if change
        else "no setting moves that by 5%; more GPUs do, in proportion"
    )
    return (
        f"Breaks first: {_BREAKS[found['limit']]}, beyond {found['concurrency']:,} requests in flight "
        f"({found['requests_per_s']:,.1f} requests/s, {found['times_this_load']:.2g} times this load); {helps}."
    )


def cost_line(cost: Mapping[str, float]) -> str:
    """`prices.costs` as a sentence; empty without any."""
    parts = []
    if "cost_per_hour" in cost:
        parts.append(
            f"{cost['cost_per_million_tokens']:.4g} for a million output tokens "
            f"({cost['cost_per_hour']:,.2f} an hour, {cost['tokens_per_currency_unit']:,.0f} tokens for 1)"
        )
    if "kwh_per_million_tokens" in cost:
        parts.append(
            f"at most {cost['kwh_per_million_tokens']:.3g} kWh for a million output tokens "
            f"({cost['tokens_per_joule']:.3g} tokens a joule) at the GPUs' full power"
        )
    return f"Costs: {'; '.join(parts)}." if parts else ""
