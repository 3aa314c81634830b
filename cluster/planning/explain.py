"""Where the predicted time of a step goes: each operation's time by what it waits for (memory, arithmetic, links).

The shares come from predictions with one limit after the other taken away: first the device multiplies in no time,
then it reads in no time, then each kind of collective takes none. What each of these saves is its share, and what is
left are overheads. So `products` is what multiplying takes beyond the reading that it hides behind, and shares add up
to the step. It needs to know nothing of the formulas.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from cluster.hardware import Cluster, Device, Link
from cluster.planning.cost_model import StepShape
from cluster.planning.dp_groups import GroupShapes
from cluster.planning.planner import PlannedLayout, PlanRequest, cost_model, replica_load
from qwen3_dist.config import ModelConfig
from qwen3_dist.layout import Layout

WEIGHTS, KV, ACTIVATIONS, PRODUCTS, OVERHEADS, WAITS = (
    "weights",
    "KV cache",
    "activations",
    "products",
    "overheads",
    "pipeline waits",
)
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
_NO_TIME = 1e12  # times as fast as the device or the link
# What an operation reads, by its name in `CostModel.step_parts`; all others read weights.
_READS = {"attention of decodes": KV, "attention of prompts": KV, "norms, rope, residuals": ACTIVATIONS}
_PIPELINE, _DISPATCH = "pipeline", "dispatch"


@dataclass(frozen=True)
class Share:
    """Seconds of one operation of `CostModel.step_parts` that one term accounts for."""

    term: str
    operation: str
    seconds: float


@dataclass(frozen=True)
class ExplainedStep:
    """A step of the dp group with the most prompts. `kind` is decode or prompt, and `weight` its share of the steps in
    which a sequence decodes."""

    kind: str
    shape: StepShape
    weight: float
    shares: tuple[Share, ...]

    @property
    def seconds(self) -> float:
        return sum(share.seconds for share in self.shares)

    @property
    def terms(self) -> dict[str, float]:
        """Seconds of each term, the largest first."""
        sums: dict[str, float] = {}
        for share in self.shares:
            sums[share.term] = sums.get(share.term, 0.0) + share.seconds
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def operations(self, term: str) -> dict[str, float]:
        """Seconds of the operations of a term, the largest first."""
        found = {share.operation: share.seconds for share in self.shares if share.term == term}
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def explain_steps(
    config: ModelConfig,
    cluster: Cluster,
    request: PlanRequest,
    planned: PlannedLayout,
    *,
    spread: bool = False,
) -> tuple[ExplainedStep, ExplainedStep]:
    """The mean decode step and the mean step with prompts of those in which a sequence decodes, for a layout that
    `plan` found to fit, at its load. `spread`: requests come at random. Weighed, they are the predicted ITL."""
    request = replace(request, concurrency=planned.concurrency)
    seen = replica_load(config, planned.layout, cluster, request, spread=spread).steps()
    explained = (("decode", seen.decode, 1 - seen.prompt_share), ("prompt", seen.prompt, seen.prompt_share))
    first, second = (
        ExplainedStep(
            kind, each.largest, share, tuple(step_shares(config, planned.layout, cluster, request, each))
        )
        for kind, each, share in explained
    )
    return first, second


def mean_terms(steps: tuple[ExplainedStep, ...]) -> dict[str, float]:
    """Seconds of each term in the mean of steps of all kinds."""
    sums: dict[str, float] = {}
    for step in steps:
        for term, seconds in step.terms.items():
            sums[term] = sums.get(term, 0.0) + step.weight * seconds
    return sums


def sequences_in_step(request: PlanRequest, planned: PlannedLayout) -> int:
    """Sequences that a dp group of the layout runs at once at this load."""
    groups = planned.replicas * planned.layout.dp
    demand = ceil(request.concurrency / groups)
    return max(1, min(demand, request.max_num_batched_tokens, planned.max_batch // planned.layout.dp))


def step_shares(
    config: ModelConfig, layout: Layout, cluster: Cluster, request: PlanRequest, shapes: GroupShapes
) -> Iterator[Share]:
    """The shares of a step's time. They add up to `CostModel.step_seconds` of the largest group, less what its experts
    have less to do than if all groups were as large."""

    def parts(machine: Cluster) -> dict[str, float]:
        model = cost_model(config, layout, machine, request)
        found = model.step_parts(shapes.largest)
        if saved_s := shapes.shared_seconds(model):
            found["experts"] -= saved_s
        return found

    before = parts(cluster)
    if waits := before.pop(_PIPELINE, 0.0):
        yield Share(WAITS, _PIPELINE, waits)
    for limit, machine in _without_limits(cluster):
        after = parts(machine)
        for operation, seconds in before.items():
            saved = seconds - after.get(operation, 0.0)
            if saved > 1e-12:
                yield Share(_term(limit, operation), operation, saved)
        before = {operation: after.get(operation, 0.0) for operation in before}
    for operation, seconds in before.items():
        if seconds > 1e-12:
            yield Share(OVERHEADS, operation, seconds)


def _term(limit: str, operation: str) -> str:
    if limit == WEIGHTS:
        return _READS.get(operation, WEIGHTS)
    if limit == PRODUCTS:
        return limit
    kind = limit.replace("_", "-")
    return f"{_DISPATCH}, {kind}" if operation == _DISPATCH else kind


def _without_limits(cluster: Cluster) -> Iterator[tuple[str, Cluster]]:
    """The cluster with one limit after the other taken away, with the name of what was taken away last."""
    device = _multiplying_at_once(cluster.device)
    yield PRODUCTS, replace(cluster, device=device)
    device = replace(device, read_bytes_per_s=device.read_bytes_per_s * _NO_TIME)
    cluster = replace(cluster, device=device)
    yield WEIGHTS, cluster
    for kind in COLLECTIVES:
        links = (_at_once(link, kind) for link in (cluster.inside, cluster.between))
        cluster = replace(cluster, inside=next(links), between=next(links))
        yield kind, cluster


def _multiplying_at_once(device: Device) -> Device:
    rates = tuple((rows, rate * _NO_TIME) for rows, rate in device.row_rates)
    return replace(device, flops_per_s=device.flops_per_s * _NO_TIME, row_rates=rates)


def _at_once(link: Link, kind: str) -> Link:
    free = Link(0.0, link.bytes_per_s * _NO_TIME)
    return replace(link, **{kind: free})  # type: ignore[arg-type]
