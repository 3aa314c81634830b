"""`qwen3-dist plan` for kinds of GPUs: the fewest of each that serve a rate, or given sizes side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qwen3_dist.errors import ConfigError
from serve_app.cli.plan_table import aligned, load_line, speed

if TYPE_CHECKING:
    from cluster.hardware import Cluster
    from cluster.planning.gpu_kinds import GpuKind
    from cluster.planning.layout_loads import RatedLayout
    from cluster.planning.planner import PlannedLayout, PlanRequest
    from qwen3_dist.config import ModelConfig

_LEGEND = (
    "layout     the best on these GPUs",
    "headroom   how much more it serves within its KV cache, --ttft-ms and --itl-ms",
)


@dataclass(frozen=True)
class Choice:
    """One kind of GPUs, and the layouts on it, best first; or the `reason` why there is none.

    label: the kind as it was given. A cluster whose size was found has its best layout alone. rated: the same layouts
    under the rate, if there is one.
    """

    kind: str
    label: str
    cluster: Cluster
    planned: Sequence[PlannedLayout] = ()
    rated: Sequence[RatedLayout] = ()
    cost: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""

    @property
    def gpus(self) -> str:
        """The cluster as `--gpus` takes it; what was given if no size was found."""
        return self.label if self.reason else f"{self.cluster.num_devices}x{self.kind}"

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints for a kind."""
        row: dict[str, Any] = {"gpus": self.gpus}
        if self.reason:
            return {**row, "reason": self.reason}
        row |= {"num_gpus": self.cluster.num_devices, "replicas": self.planned[0].replicas}
        best = self.rated[0] if self.rated else self.planned[0]
        return {**row, **best.as_json(), "cost": self.cost}


def choices(
    config: ModelConfig,
    kinds: Sequence[GpuKind],
    request: PlanRequest,
    rate: float | None,
    prices: Mapping[str, float],
) -> list[Choice]:
    """The best of every kind, the best kind first: the cheapest if there are prices, else for a rate the one of the
    fewest GPUs, else the one of most tokens/s/GPU. Raises ConfigError if no kind serves the load."""
    found = [_choice(config, kind, request, rate, prices) for kind in kinds]
    if all(one.reason for one in found):
        raise ConfigError("; ".join(dict.fromkeys(one.reason for one in found)))
    return sorted(found, key=lambda one: (bool(one.reason), _badness(one)))


def choice_lines(found: Sequence[Choice], request: PlanRequest) -> list[str]:
    """The table of `choices` and its legend."""
    priced = any("cost_per_hour" in one.cost for one in found)
    powered = any("kwh_per_million_tokens" in one.cost for one in found)
    rated = any(one.rated for one in found)
    header = ["", "GPUs", "layout", "replicas", *(["in flight", "most req/s", "headroom"] if rated else [])]
    header += ["TTFT ms", "ITL ms", "tokens/s", *(["cost/h", "cost/M tokens"] if priced else [])]
    header += ["kWh/M tokens"] if powered else []
    columns = [("cost_per_hour", ",.2f"), ("cost_per_million_tokens", ",.3f")] if priced else []
    columns += [("kwh_per_million_tokens", ",.3f")] if powered else []
    rows = [header]
    notes = []
    for place, one in enumerate(found):
        if one.reason:
            notes.append(f"{one.label}: {one.reason}.")
            continue
        best = one.planned[0]
        row = ["*" if place == 0 else "", one.gpus, str(best.layout), str(best.replicas)]
        for under in one.rated[:1]:
            row += [f"{under.in_flight:,.1f}", f"{under.most_per_s:,.1f}", f"{under.headroom:.0%}"]
        row += [speed(value) for value in (best.ttft_ms, best.itl_ms, best.tokens_per_s)]
        row += [_cell(one, name, form) for name, form in columns]
        rows.append(row)
    why = "cheapest" if priced else "fewest GPUs" if rated else "most tokens/s/GPU"
    legend = [f"*          {why} within --ttft-ms and --itl-ms", *(_LEGEND if rated else _LEGEND[:1])]
    legend.append(load_line(request, found[0].rated[0].rate if rated else None))
    legend += ["tokens     of output; kWh at the GPUs' full power, without hosts"] if powered else []
    return [*aligned(rows, left=(0, 1, 2)), "", *legend, *notes]


def best_on(
    config: ModelConfig, kind: GpuKind, request: PlanRequest, rate: float | None, prices: Mapping[str, float]
) -> Choice:
    """The layouts on one kind, at the concurrency of `request` or under `rate`; they may all not fit.

    Raises ConfigError if layouts fit but none keeps the limits or the rate.
    """
    from cluster.planning.fleet import all_under, check_rate, fewest
    from cluster.planning.limits import check_limits
    from cluster.planning.planner import plan
    from cluster.planning.prices import costs

    cluster = kind.cluster
    rated: list[RatedLayout] = []
    if rate is None:
        planned = plan(config, cluster, request)
        check_limits(planned, request)
    elif kind.sized:
        rated = all_under(config, cluster, request, rate)
        check_rate(config, cluster, request, rate, rated)
    else:
        fleet = fewest(config, cluster, request, rate)
        cluster, rated = fleet.cluster, [fleet.found]
    if rated:
        planned = [one.planned for one in rated]
    cost = costs(cluster, planned[0].tokens_per_s or 0.0, prices.get(kind.name))
    return Choice(kind.name, kind.label, cluster, planned, rated, cost)


def _choice(
    config: ModelConfig, kind: GpuKind, request: PlanRequest, rate: float | None, prices: Mapping[str, float]
) -> Choice:
    """`best_on`, with what it raises as the reason."""
    try:
        found = best_on(config, kind, request, rate, prices)
    except ConfigError as error:
        return Choice(kind.name, kind.label, kind.cluster, reason=str(error))
    if not found.planned[0].fits:
        reason = f"no layout fits {kind.cluster.num_devices} x {kind.name}; take larger GPUs or more of them"
        return Choice(kind.name, kind.label, kind.cluster, reason=reason)
    return found


def _badness(one: Choice) -> float:
    if one.reason:
        return 0.0
    if "cost_per_hour" in one.cost:
        return one.cost["cost_per_hour"] if one.rated else one.cost["cost_per_million_tokens"]
    if one.rated:
        return one.cluster.num_devices
    return -(one.planned[0].tokens_per_s_per_gpu or 0.0)


def _cell(one: Choice, name: str, form: str) -> str:
    return format(one.cost[name], form) if name in one.cost else "-"
