"""A measured run beside its prediction, and which term of the step time would have to change to explain it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil

from cluster.hardware import Cluster
from cluster.planning.burst import predict_burst
from cluster.planning.burst_point import BurstPoint
from cluster.planning.cost_model import StepShape
from cluster.planning.layout_loads import LayoutLoads
from cluster.planning.planner import PlannedLayout, PlanRequest, cost_model, predict
from qwen3_dist.config import ModelConfig
from qwen3_dist.errors import ConfigError
from qwen3_dist.layout import Layout

# Ratios of measured to predicted within this of 1 count as agreement.
TOLERANCE = 0.1
PROMPTS_BESIDE, OWN_PROMPT, WAITING = "prompts beside decodes", "reading its own prompt", "waiting"
OUTSIDE = "HTTP and text"
# The parts of `CostModel.step_parts`, by what a user can change.
TERMS = {
    "reading weights": ("attention projections", "dense FFN", "router", "experts", "head"),
    "reading the KV cache": ("attention of decodes",),
    "collectives": ("tp all-reduce", "dispatch", "stage send", "embedding"),
    "overheads": ("overhead", "layer overhead", "norms, rope, residuals"),
    "waiting in the pipeline": ("pipeline",),
}


@dataclass(frozen=True)
class MeasuredRun:
    """What a load generator measured, and the load that it sent.

    rate and max_concurrency are None where they did not bound the load; with neither, all prompts came at once.
    Latencies are means, of a burst medians; itl_ms is the time between tokens, None for answers of one token.
    """

    name: str
    num_prompts: int
    input_len: int
    output_len: int
    rate: float | None
    max_concurrency: int | None
    ttft_ms: float
    itl_ms: float | None
    tokens_per_s: float

    @property
    def most_in_flight(self) -> int:
        """Requests in flight that the load generator allowed."""
        return min(self.max_concurrency or self.num_prompts, self.num_prompts)

    @property
    def is_burst(self) -> bool:
        """Whether all prompts came at once."""
        return self.rate is None and (
            self.max_concurrency is None or self.max_concurrency >= self.num_prompts
        )


@dataclass(frozen=True)
class Prediction:
    """The figures of a run as the model has them. in_flight: requests in the service at once.

    ttft_terms, itl_terms: what the two consist of, in ms.
    """

    in_flight: float
    ttft_ms: float
    itl_ms: float | None
    tokens_per_s: float
    ttft_terms: Mapping[str, float] = field(default_factory=dict)
    itl_terms: Mapping[str, float] = field(default_factory=dict)


def predict_run(
    config: ModelConfig, layout: Layout, cluster: Cluster, request: PlanRequest, run: MeasuredRun
) -> Prediction:
    """The prediction for `run` on as many replicas of `layout` as `cluster` holds. Raises ConfigError if the layout
    does not fit."""
    if not cluster.replicas(layout.world):
        raise ConfigError(f"{layout} needs {layout.world} devices, and {cluster.num_devices} are given")
    request = replace(request, input_len=run.input_len, output_len=run.output_len, ttft_ms=None, itl_ms=None)
    planned, in_flight = _steady_state(config, layout, cluster, request, run)
    if not planned.fits:
        raise ConfigError(
            f"{layout} does not fit on {cluster.num_devices} x {cluster.device.name}: {planned.reason}"
        )
    model = cost_model(config, layout, cluster, request)
    most = min(planned.max_batch // layout.dp, request.max_num_batched_tokens)
    batch = max(1, min(ceil(in_flight / (planned.replicas * layout.dp)), most))
    ttft_ms, itl_ms, tokens_per_s = planned.ttft_ms or 0.0, planned.itl_ms, planned.tokens_per_s or 0.0
    if run.is_burst:
        point = BurstPoint(ceil(run.num_prompts / planned.replicas), run.input_len, run.output_len)
        burst = predict_burst(model, point, request.max_num_batched_tokens, most)
        ttft_ms, itl_ms = burst.ttft_ms, burst.itl_ms
        tokens_per_s = burst.output_tokens_per_s * run.num_prompts / point.num_prompts
    prompt = StepShape(0, 0, run.input_len, run.input_len * (run.input_len + 1) // 2, 1)
    outside_ms = 0.0 if run.is_burst else min(ttft_ms, 1e3 * cluster.outside_s(run.input_len))
    own_ms = min(ttft_ms - outside_ms, 1e3 * model.step_seconds(prompt))
    ttft_terms = {OWN_PROMPT: own_ms, OUTSIDE: outside_ms, WAITING: ttft_ms - own_ms - outside_ms}
    itl_terms: dict[str, float] = {}
    if itl_ms is not None:
        context = int(batch * (run.input_len + run.output_len / 2))
        parts = model.step_parts(StepShape(batch, context, 0, 0, batch))
        itl_terms = _terms(parts)
        itl_terms[PROMPTS_BESIDE] = max(0.0, itl_ms - sum(itl_terms.values()))
    shown = {name: value for name, value in itl_terms.items() if value > 0}
    return Prediction(in_flight, ttft_ms, itl_ms, tokens_per_s, ttft_terms, shown)


def factors(terms: Mapping[str, float], predicted: float, measured: float) -> dict[str, float | None]:
    """How many times as long each term alone would have to take for `predicted` to be `measured`; None if even
    nothing of it would be too much."""
    found: dict[str, float | None] = {}
    for name, value in terms.items():
        factor = 1 + (measured - predicted) / value if value else -1.0
        found[name] = factor if factor > 0 else None
    return found


def common_term(runs: Sequence[tuple[Mapping[str, float], float, float]]) -> tuple[str, float, float] | None:
    """The one term whose change by one factor explains several runs best: its name, the factor, and the largest
    relative error that is left. Runs are (terms, predicted, measured); None without a term that all have.

    The factor is the least-squares fit of the relative errors, so that a slow run does not outweigh the others.
    """
    runs = [run for run in runs if run[2] > 0]
    names = [name for name in runs[0][0] if all(terms.get(name) for terms, _, _ in runs)] if runs else []
    best: tuple[str, float, float] | None = None
    for name in names:
        shares = [terms[name] / measured for terms, _, measured in runs]
        missing = [1 - predicted / measured for _, predicted, measured in runs]
        change = sum(a * b for a, b in zip(shares, missing, strict=True)) / sum(a * a for a in shares)
        change = max(change, -1.0)
        left = max(abs(gap - change * share) for gap, share in zip(missing, shares, strict=True))
        if best is None or left < best[2]:
            best = (name, 1 + change, left)
    return best


def agrees(predicted: float, measured: float) -> bool:
    """Whether they differ by at most `TOLERANCE` of the prediction."""
    return abs(measured / predicted - 1) <= TOLERANCE if predicted else not measured


def _steady_state(
    config: ModelConfig, layout: Layout, cluster: Cluster, request: PlanRequest, run: MeasuredRun
) -> tuple[PlannedLayout, float]:
    """The prediction for the load of `run`, and the requests in flight. A run with a rate and a bound of requests in
    flight is what gives fewer."""
    most = run.most_in_flight
    if run.rate is not None:
        under = LayoutLoads(config, layout, cluster, request).under(run.rate)
        if under.in_flight <= most:
            return under.planned, under.in_flight
    return predict(config, layout, cluster, replace(request, concurrency=most)), most


def _terms(parts: Mapping[str, float]) -> dict[str, float]:
    """`CostModel.step_parts` in ms, by what a user can change; parts that no term names are overheads."""
    term_of = {part: term for term, names in TERMS.items() for part in names}
    found: dict[str, float] = {}
    for part, seconds in parts.items():
        term = term_of.get(part, "overheads")
        found[term] = found.get(term, 0.0) + 1e3 * seconds
    return found
