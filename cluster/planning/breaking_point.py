"""Which limit a layout breaks first as load grows, and which change would move that most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from cluster.planning.layout_loads import LayoutLoads, last
from cluster.planning.official import planned
from cluster.planning.planner import PlannedLayout
from qwen3_dist.errors import QwenDistError

# A change that moves the breaking point by less is not worth its trouble.
_LEAST_GAIN = 1.05


@dataclass(frozen=True)
class BreakingPoint:
    """The load up to which a layout holds, and what breaks beyond.

    limit: `ttft`, `itl`, `kv_cache` or `step_tokens`. concurrency: most requests in flight in the whole cluster;
    0 if not even one keeps the limits. requests_per_s: what it serves then.
    """

    limit: str
    concurrency: int
    requests_per_s: float


@dataclass(frozen=True)
class Change:
    """A change of settings, and the breaking point that it leads to."""

    setting: str
    then: BreakingPoint


def breaking_point(loads: LayoutLoads) -> BreakingPoint:
    """What breaks first while the requests in flight grow. `loads` must fit.

    - `kv_cache`: the cache is full, and further requests queue.
    - `step_tokens`: prompts fill every step. A group with n sequences reads n prompts, of p tokens that are computed,
      in the s steps of an answer. So steps are full from n * p = s * (max_num_batched_tokens - n * (1 + drafted)) on.
    - `ttft`, `itl`: the limit of the request, if it has one.
    """
    request, load = loads.request, loads.request.workload
    prompt, steps = load.input_len - load.cached_len, 1 + load.decode_steps
    ends = {
        "kv_cache": loads.largest,
        "step_tokens": steps * request.max_num_batched_tokens // (prompt + steps * (1 + load.drafted)),
    }
    reached = min(ends.values())
    for name, value, limit in (
        ("ttft", _ttft, request.ttft_ms),
        ("itl", _itl, request.itl_ms),
    ):
        if limit is not None:
            ends[name] = last(reached, lambda n, value=value, limit=limit: value(loads.at(n)) <= limit)  # type: ignore[misc]
    # Of limits that break at the same load, the user's own is named.
    first = min(reversed(ends), key=lambda name: ends[name])
    sequences = ends[first]
    return BreakingPoint(
        first, sequences * loads.groups, loads.requests_per_s(sequences) if sequences else 0.0
    )


def best_change(loads: LayoutLoads, now: BreakingPoint, layouts: list[PlannedLayout]) -> Change | None:
    """The setting that raises the rate at the breaking point most; None if none raises it by 5%.

    Tried are an 8-bit KV cache, int8 weights, half and twice `max_num_batched_tokens`, and the other `layouts` on the
    same cluster.
    """
    best: Change | None = None
    for setting, changed in _changes(loads, layouts):
        if not changed.fits:
            continue
        then = breaking_point(changed)
        if then.requests_per_s > (best.then.requests_per_s if best else _LEAST_GAIN * now.requests_per_s):
            best = Change(setting, then)
    return best


def _changes(loads: LayoutLoads, layouts: list[PlannedLayout]) -> Iterator[tuple[str, LayoutLoads]]:
    config, cluster, request = loads.config, loads.cluster, loads.request
    if request.kv_cache_dtype == "auto":
        yield (
            "kv_cache_dtype=fp8",
            LayoutLoads(config, loads.layout, cluster, replace(request, kv_cache_dtype="fp8")),
        )
    try:
        rounded = planned(config, "int8")
    except QwenDistError:  # its weights are quantised already
        rounded = None
    if rounded is not None:
        yield "quantize=int8", LayoutLoads(rounded, loads.layout, cluster, request)
    for tokens in (request.max_num_batched_tokens // 2, 2 * request.max_num_batched_tokens):
        if tokens:
            other = replace(request, max_num_batched_tokens=tokens)
            yield f"max_num_batched_tokens={tokens}", LayoutLoads(config, loads.layout, cluster, other)
    for one in layouts:
        if one.fits and one.layout != loads.layout:
            yield f"layout={one.layout}", LayoutLoads(config, one.layout, cluster, request)


def _ttft(one: PlannedLayout) -> float:
    return one.ttft_ms or 0.0


def _itl(one: PlannedLayout) -> float:
    return one.itl_ms or 0.0
