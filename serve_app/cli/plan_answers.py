"""What `qwen3-dist plan` says of the best layout beside its figures: costs, and what breaks first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.planning.planner import PlanRequest
    from qwen3_dist.config import ModelConfig
    from serve_app.cli.plan_kinds import Choice

_BREAKS = {
    "kv_cache": "the KV cache is full, and requests queue",
    "step_tokens": "prompts fill every step (max_num_batched_tokens)",
    "ttft": "TTFT exceeds --ttft-ms",
    "itl": "ITL exceeds --itl-ms",
}
# Layouts that are asked whether they would hold more, by their place and by their cache.
_LAYOUTS, _LARGEST_CACHES = 8, 4


def breaks_first(config: ModelConfig, request: PlanRequest, best: Choice) -> dict[str, Any]:
    """What breaks first with the best layout, and the change that helps most, for `--json`. times_this_load: of the
    rate, or without one of the requests in flight."""
    from cluster.planning.breaking_point import best_change, breaking_point
    from cluster.planning.layout_loads import LayoutLoads

    loads = LayoutLoads(config, best.planned[0].layout, best.cluster, request)
    now = breaking_point(loads)
    fitting = [one for one in best.planned if one.fits]
    by_cache = sorted(fitting, key=lambda one: -one.replicas * one.max_batch)[:_LARGEST_CACHES]
    change = best_change(loads, now, [*fitting[:_LAYOUTS], *by_cache])
    asked = best.planned[0].concurrency
    times = now.requests_per_s / best.rated[0].rate if best.rated else now.concurrency / asked
    found: dict[str, Any] = {
        "limit": now.limit,
        "concurrency": now.concurrency,
        "requests_per_s": round(now.requests_per_s, 3),
        "times_this_load": round(times, 3),
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
        f"({found['requests_per_s']:,.1f} requests/s, {found['times_this_load']:.3g} times this load); {helps}."
    )


def disaggregated(
    config: ModelConfig, request: PlanRequest, best: Choice, to_size: float | None
) -> dict[str, Any]:
    """Prefill and decode on replicas of their own beside the best layout that does both, for `--json`. `to_size` is
    the rate for which the number of GPUs was found, None if it was given."""
    from cluster.planning.disaggregated import best_split
    from cluster.planning.fleet import all_under

    together = best.rated[0] if best.rated else all_under(config, best.cluster, request, math.inf)[0]
    found = best_split(config, best.cluster, request, to_size)
    return {
        **(found.as_json() if found is not None else {"can_run": False, "prefill": None, "decode": None}),
        "together": {
            "layout": str(together.planned.layout),
            "replicas": together.planned.replicas,
            "num_gpus": best.cluster.num_devices,
            "most_requests_per_s": round(together.most_per_s, 3),
        },
    }


def disaggregated_line(found: Mapping[str, Any]) -> str:
    """`disaggregated` as a sentence."""
    what = "Prefill and decode on different replicas (planned only: qwen3-dist cannot run this yet)"
    if found["prefill"] is None:
        return f"{what}: no such replicas fit and keep the limits."
    pools = [f"{found[of]['replicas']} x {found[of]['layout']}" for of in ("prefill", "decode", "together")]
    figures = (
        f"TTFT {found['ttft_ms']:,.1f} ms, ITL {found['itl_ms']:,.1f} ms, {found['transfer_ms']:,.1f} ms to move a "
        "prompt's KV cache"
    )
    together = found["together"]
    return (
        f"{what}: {pools[0]} for prompts and {pools[1]} for decoding on {found['num_gpus']} GPUs serve up to "
        f"{found['most_requests_per_s']:,.1f} requests/s ({figures}); {pools[2]} for both on {together['num_gpus']} "
        f"serve up to {together['most_requests_per_s']:,.1f}."
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
