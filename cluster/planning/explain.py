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
from cluster.planning.planner import PlannedLayout, PlanRequest, cost_model
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
    """A step of a layout in a steady state. `kind` is decode or prompt, and `weight` its share of all steps."""

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
    config: ModelConfig, cluster: Cluster, request: PlanRequest, planned: PlannedLayout
) -> tuple[ExplainedStep, ExplainedStep]:
    """The decode step and the prompt step of a layout that `plan` found to fit, at the request's load."""
    decode, prompt, weight = steady_shapes(request, sequences_in_step(request, planned))
    explained = (("decode", decode, 1 - weight), ("prompt", prompt, weight))
    first, second = (
        ExplainedStep(kind, shape, share, tuple(step_shares(config, planned.layout, cluster, request, shape)))
        for kind, shape, share in explained
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


def steady_shapes(request: PlanRequest, batch: int) -> tuple[StepShape, StepShape, float]:
    """A decode step and a step with prompts of one dp group of `batch` sequences, and the share of steps with prompts.

    While a sequence makes its output, each of the others ends once and its successor's prompt is read, as in
    `clients.spread_out`.
    """
    prompt, output = request.input_len, request.output_len
    context = batch * (prompt + output / 2)
    chunks = ceil(prompt / max(1, request.max_num_batched_tokens - batch))
    steps = max(
        1, ceil(batch * prompt / request.max_num_batched_tokens), min(output, batch * chunks)
    )  # that have prompts
    decodes = min(batch - 1, round(batch * (output - 1) / max(output, steps)))
    mixed = StepShape(
        decodes,
        int(context * decodes / batch),
        round(batch * prompt / steps),
        round(batch * prompt * (prompt + 1) / 2 / steps),
        min(batch, decodes + max(1, round(batch / steps))),
    )
    return StepShape(batch, int(context), 0, 0, batch), mixed, steps / max(output, steps)


def step_shares(
    config: ModelConfig, layout: Layout, cluster: Cluster, request: PlanRequest, shape: StepShape
) -> Iterator[Share]:
    """The shares of a step's time. They add up to `CostModel.step_seconds`."""

    def parts(machine: Cluster) -> dict[str, float]:
        return cost_model(config, layout, machine, request).step_parts(shape)

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
