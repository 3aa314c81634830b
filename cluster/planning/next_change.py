"""Changes of a layout or a setting that are predicted to serve a load faster, each with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from cluster.hardware import Cluster
from cluster.planning.explain import KV, WEIGHTS, explain_steps, mean_terms, sequences_in_step
from cluster.planning.layout_loads import LayoutLoads
from cluster.planning.memory import kv_item_bytes
from cluster.planning.official import planned as rounded
from cluster.planning.planner import PlannedLayout, PlanRequest, candidates, predict
from cluster.planning.ranking import TIE
from qwen3_dist.config import ModelConfig
from qwen3_dist.errors import ConfigError
from qwen3_dist.layout import Layout

_MOST_CHANGED = 2  # axes of a neighbouring layout that differ
_ROUNDED = ("fp8", "int4")


class Served(NamedTuple):
    """A prediction, and by what it is compared: tokens/s/GPU, or the most requests/s within the limits if there is a
    rate."""

    planned: PlannedLayout
    most: float


@dataclass(frozen=True)
class Setting:
    """What a prediction is for, beside its layout: the model as it is served, the load, and the rate if it has one."""

    config: ModelConfig
    request: PlanRequest
    rate: float | None = None

    def on(self, cluster: Cluster, layout: Layout) -> Served:
        """What `layout` serves on `cluster`."""
        if self.rate is None:
            one = predict(self.config, layout, cluster, self.request)
            return Served(one, one.tokens_per_s_per_gpu or 0.0)
        rated = LayoutLoads(self.config, layout, cluster, self.request).under(self.rate)
        return Served(rated.planned, rated.most_per_s)


@dataclass(frozen=True)
class Change:
    """A layout or a setting in place of the present one. `options` are those of `serve`. `gain` is that of tokens/s,
    or of the most requests/s if there is a rate.

    changes_answers: whether weights or keys are rounded, so that answers differ a little.
    """

    options: str
    reason: str
    gain: float
    changes_answers: bool
    before: PlannedLayout
    after: PlannedLayout
    at_rate: bool

    def __str__(self) -> str:
        figures = [
            f"{name} {_figure(after)} instead of {_figure(before)} ms"
            for name, before, after in (
                ("ITL", self.before.itl_ms, self.after.itl_ms),
                ("TTFT", self.before.ttft_ms, self.after.ttft_ms),
            )
            if before and after
        ]
        what = "of the most requests/s" if self.at_rate else "tokens/s"
        note = "; answers change a little" if self.changes_answers else ""
        return f"{self.options} {self.reason}: {', '.join(figures)}, {self.gain:+.0%} {what}{note}"

    def as_json(self) -> dict[str, object]:
        return {
            "options": self.options,
            "reason": self.reason,
            "most_requests_per_s_gain" if self.at_rate else "tokens_per_s_gain": round(self.gain, 4),
            "changes_answers": self.changes_answers,
            "before": self.before.as_json(),
            "after": self.after.as_json(),
        }


def next_changes(
    config: ModelConfig, cluster: Cluster, request: PlanRequest, layout: Layout, rate: float | None = None
) -> list[Change]:
    """The best neighbouring layout and the best of each setting, the largest gain first; under `rate` requests/s, or
    with the requests in flight of `request`.

    A neighbour differs in at most two of tp, dp, pp and ep. Raises ConfigError as `planned_layout` does.
    """
    here = Setting(config, request, rate)
    before = planned_layout(here, layout, cluster)
    found = [_better(cluster, here, before, here, one) for one in _neighbours(here, layout, cluster)]
    changes = sorted(filter(None, found), key=_by_gain)[:1]
    for choices in _settings(here):
        of_setting = [
            _better(cluster, here, before, changed, changed.on(cluster, layout), words)
            for words, changed in choices
        ]
        changes += sorted(filter(None, of_setting), key=_by_gain)[:1]
    return sorted(changes, key=_by_gain)


def planned_layout(here: Setting, layout: Layout, cluster: Cluster) -> Served:
    """The prediction for `layout`. Raises ConfigError if it has no place in the cluster or does not fit; the message
    says which neighbour does."""
    [layout] = candidates(here.config, cluster, layout)
    one = here.on(cluster, layout)
    if one.planned.fits:
        return one
    near = max(_neighbours(here, layout, cluster), key=lambda each: each.most, default=None)
    advice = f"; {near.planned.layout} is near and fits" if near else "; take more or larger devices"
    raise ConfigError(f"layout {layout} does not fit: {one.planned.reason}{advice}")


def _neighbours(here: Setting, layout: Layout, cluster: Cluster) -> Iterator[Served]:
    """Layouts that fit and are not far from `layout`."""
    for one in candidates(here.config, cluster):
        changed = sum(getattr(one, axis.name) != getattr(layout, axis.name) for axis in fields(Layout))
        if 1 <= changed <= _MOST_CHANGED:
            served = here.on(cluster, one)
            if served.planned.fits:
                yield served


def _settings(here: Setting) -> Iterator[list[tuple[str, Setting]]]:
    """For each setting of `serve` the other values that may be worth it."""
    config, request = here.config, here.request
    if config.quantization is None:
        yield [(f"--quantize {to}", replace(here, config=rounded(config, to))) for to in _ROUNDED]
    if kv_item_bytes(config, request.kv_cache_dtype) > 1:
        yield [("--kv-cache-dtype fp8", replace(here, request=replace(request, kv_cache_dtype="fp8")))]
    budget = request.max_num_batched_tokens
    yield [
        (
            f"--max-num-batched-tokens {tokens}",
            replace(here, request=replace(request, max_num_batched_tokens=tokens)),
        )
        for tokens in (2 * budget, max(1, budget // 2))
    ]


def _better(
    cluster: Cluster,
    here: Setting,
    before: Served,
    there: Setting,
    after: Served,
    words: str = "",
) -> Change | None:
    """The change from one prediction to another; None if it gains too little, or nothing keeps the limits before."""
    gain = after.most / before.most - 1 if before.most else 0.0
    if gain < TIE or not after.planned.fits:
        return None
    return Change(
        words or f"--layout {after.planned.layout}",
        _reason(cluster, here, before.planned, there, after.planned),
        gain,
        words.startswith(("--quantize", "--kv-cache-dtype")),
        before.planned,
        after.planned,
        here.rate is not None,
    )


def _by_gain(change: Change) -> float:
    return -change.gain


def _reason(
    cluster: Cluster, here: Setting, before: PlannedLayout, there: Setting, after: PlannedLayout
) -> str:
    """What makes the change faster: more requests in flight, or else the term that falls most in the mean step."""
    running = [_in_flight(here.request, before), _in_flight(there.request, after)]
    spread = here.rate is not None
    if running[1] > 1.01 * running[0] and not spread:
        return f"keeps {running[1]:,} requests in flight instead of {running[0]:,}"
    old, new = (
        mean_terms(explain_steps(each.config, cluster, each.request, one, spread=spread))
        for each, one in ((here, before), (there, after))
    )
    term = max(old, key=lambda term: old[term] - new.get(term, 0.0))
    return _fall(term, old[term], new.get(term, 0.0))


def _fall(term: str, before_s: float, after_s: float) -> str:
    """In words: that the mean step takes less time for a term."""
    if not after_s:
        return f"needs no {term} ({_figure(1e3 * before_s)} ms a step)"
    share = f"{1 - after_s / before_s:.0%}"
    times = f"a step ({_figure(1e3 * after_s)} instead of {_figure(1e3 * before_s)} ms)"
    if term in (KV, WEIGHTS):
        return f"reads {share} less {'KV' if term == KV else 'weights'} {times}"
    return f"spends {share} less time on {term} {times}"


def _in_flight(request: PlanRequest, one: PlannedLayout) -> int:
    most = one.replicas * one.layout.dp * sequences_in_step(request, one)
    return min(request.concurrency, most)


def _figure(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"
