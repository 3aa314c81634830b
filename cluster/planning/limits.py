"""Why no layout keeps a limit: which one, by how much, and the nearest that can be met."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from cluster.planning.planner import PlannedLayout, PlanRequest
from qwen3_dist.errors import ConfigError


def check_limits(planned: Sequence[PlannedLayout], request: PlanRequest) -> None:
    """Raises ConfigError if layouts fit but none meets both limits. The message has the nearest limit that can be
    met."""
    fitting = [one for one in planned if one.fits]
    if fitting and not any(one.meets_limits(request) for one in fitting):
        raise ConfigError(impossible(fitting, request, "no layout", f"at concurrency {request.concurrency}"))


def impossible(planned: Sequence[PlannedLayout], request: PlanRequest, who: str, when: str) -> str:
    """Why `who` fits but does not keep the limits, or does not fit at all.

    planned: the predictions at the load that the limits are to hold at, which `when` names.
    """
    fitting = [one for one in planned if one.fits]
    if not fitting:
        sized = [one for one in planned if one.bytes_per_rank]
        least = min(sized, key=lambda one: sum(one.bytes_per_rank.values()))
        return f"{who} holds the model with this load: with {least.layout}, {least.reason}; take larger GPUs"
    for name, limit in (("ttft_ms", request.ttft_ms), ("itl_ms", request.itl_ms)):
        lowest = min(fitting, key=lambda one, name=name: getattr(one, name) or 0.0)  # type: ignore[misc]
        value = getattr(lowest, name) or 0.0
        if limit is not None and value > limit:
            return (
                f"{who} meets --{name.replace('_', '-')} {limit:g} {when}: the lowest is {value:.4g} ms, "
                f"{value / limit - 1:.0%} more, with {lowest.layout}; the nearest limit that can be met is "
                f"{_next_limit(value):g}"
            )
    assert request.itl_ms is not None and request.ttft_ms is not None
    in_itl = [one for one in fitting if one.itl_ms is None or one.itl_ms <= request.itl_ms]
    best = min(in_itl, key=lambda one: one.ttft_ms or 0.0)
    ttft = best.ttft_ms or 0.0
    return (
        f"each limit can be met, but {who} meets both {when}: with --itl-ms {request.itl_ms:g}, "
        f"--ttft-ms {request.ttft_ms:g} is too low by {1 - request.ttft_ms / ttft:.0%}; the nearest that can be met "
        f"is {_next_limit(ttft):g}, with {best.layout}"
    )


def limits_of(request: PlanRequest) -> str:
    """The limits as the command line has them; empty without any."""
    named = (("--ttft-ms", request.ttft_ms), ("--itl-ms", request.itl_ms))
    return " and ".join(f"{name} {value:g}" for name, value in named if value is not None)


def _next_limit(value: float) -> float:
    """`value` rounded up to three significant digits, so that the printed limit can be met."""
    digits = 2 - (len(str(int(value))) - 1)
    step = 10.0**-digits
    return round(ceil(value / step) * step, max(0, digits))
