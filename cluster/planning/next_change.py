"""Changes of a layout or a setting that are predicted to serve a load faster, each with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from cluster.hardware import Cluster
from cluster.planning.explain import KV, WEIGHTS, explain_steps, mean_terms, sequences_in_step
from cluster.planning.memory import kv_item_bytes
from cluster.planning.official import planned as rounded
from cluster.planning.planner import PlannedLayout, PlanRequest, plan
from cluster.planning.ranking import TIE
from qwen3_dist.config import ModelConfig
from qwen3_dist.errors import ConfigError
from qwen3_dist.layout import Layout

_MOST_CHANGED = 2  # axes of a neighbouring layout that differ
_ROUNDED = ("fp8", "int4")


@dataclass(frozen=True)
class Setting:
    """What a prediction is for, beside its layout: the model as it is served, and the load."""

    config: ModelConfig
    request: PlanRequest


@dataclass(frozen=True)
class Change:
    """A layout or a setting in place of the present one. `options` are those of `serve`, `gain` is that of tokens/s.

    changes_answers: whether weights or keys are rounded, so that answers differ a little.
    """

    options: str
    reason: str
    gain: float
    changes_answers: bool
    before: PlannedLayout
    after: PlannedLayout

    def __str__(self) -> str:
        figures = [
            f"{name} {_figure(after)} instead of {_figure(before)} ms"
            for name, before, after in (
                ("ITL", self.before.itl_ms, self.after.itl_ms),
                ("TTFT", self.before.ttft_ms, self.after.ttft_ms),
            )
            if before and after
        ]
        note = "; answers change a little" if self.changes_answers else ""
        return f"{self.options} {self.reason}: {', '.join(figures)}, {self.gain:+.0%} tokens/s{note}"

    def as_json(self) -> dict[str, object]:
        return {
            "options": self.options,
            "reason": self.reason,
            "tokens_per_s_gain": round(self.gain, 4),
            "changes_answers": self.changes_answers,
            "before": self.before.as_json(),
            "after": self.after.as_json(),
        }


def next_changes(config: ModelConfig, cluster: Cluster, request: PlanRequest, layout: Layout) -> list[Change]:
    """The best neighbouring layout and the best of each setting, the largest gain first.

    A neighbour differs in at most two of tp, dp, pp and ep. Raises ConfigError if the layout has no place in the
    cluster or does not fit; the message says which neighbour does.
    """
    here = Setting(config, request)
    all_layouts = plan(config, cluster, request)
    before = planned_layout(all_layouts, layout, cluster)
    found = [_better(cluster, here, before, here, one) for one in _neighbours(all_layouts, layout)]
    changes = sorted(filter(None, found), key=_by_gain)[:1]
    for choices in _settings(here):
        of_setting = [
            _better(cluster, here, before, changed, one, words)
            for words, changed in choices
            for one in plan(changed.config, cluster, changed.request)
            if one.layout == layout and one.fits
        ]
        changes += sorted(filter(None, of_setting), key=_by_gain)[:1]
    return sorted(changes, key=_by_gain)


def planned_layout(all_layouts: list[PlannedLayout], layout: Layout, cluster: Cluster) -> PlannedLayout:
    """The prediction for `layout`. Raises ConfigError if there is none, or if it does not fit."""
    one = next((one for one in all_layouts if one.layout == layout), None)
    if one is None:
        raise ConfigError(
            f"layout {layout} has {layout.world} ranks, which do not divide the {cluster.num_devices} devices of the "
            "cluster; change --layout or the number of devices"
        )
    if one.fits:
        return one
    near = next((each for each in _neighbours(all_layouts, layout)), None)
    advice = f"; {near.layout} is near and fits" if near else "; take more or larger devices"
    raise ConfigError(f"layout {layout} does not fit: {one.reason}{advice}")


def _neighbours(all_layouts: list[PlannedLayout], layout: Layout) -> Iterator[PlannedLayout]:
    """Layouts that fit and are not far from `layout`, in the order of `plan`: the best first."""
    for one in all_layouts:
        changed = sum(getattr(one.layout, axis.name) != getattr(layout, axis.name) for axis in fields(Layout))
        if one.fits and 1 <= changed <= _MOST_CHANGED:
            yield one


def _settings(here: Setting) -> Iterator[list[tuple[str, Setting]]]:
    """For each setting of `serve` the other values that may be worth it."""
    config, request = here.config, here.request
    if config.quantization is None:
        yield [(f"--quantize {to}", Setting(rounded(config, to), request)) for to in _ROUNDED]
    if kv_item_bytes(config, request.kv_cache_dtype) > 1:
        yield [("--kv-cache-dtype fp8", Setting(config, replace(request, kv_cache_dtype="fp8")))]
    budget = request.max_num_batched_tokens
    yield [
        (
            f"--max-num-batched-tokens {tokens}",
            Setting(config, replace(request, max_num_batched_tokens=tokens)),
        )
        for tokens in (2 * budget, max(1, budget // 2))
    ]


def _better(
    cluster: Cluster,
    here: Setting,
    before: PlannedLayout,
    there: Setting,
    after: PlannedLayout,
    words: str = "",
) -> Change | None:
    """The change from one prediction to another; None if it gains too little."""
    rates = (before.tokens_per_s_per_gpu or 0.0, after.tokens_per_s_per_gpu or 0.0)
    gain = rates[1] / rates[0] - 1
    if gain < TIE:
        return None
    return Change(
        words or f"--layout {after.layout}",
        _reason(cluster, here, before, there, after),
        gain,
        words.startswith(("--quantize", "--kv-cache-dtype")),
        before,
        after,
    )


def _by_gain(change: Change) -> float:
    return -change.gain


def _reason(
    cluster: Cluster, here: Setting, before: PlannedLayout, there: Setting, after: PlannedLayout
) -> str:
    """What makes the change faster: more requests in flight, or else the term that falls most in the mean step."""
    running = [_in_flight(here.request, before), _in_flight(there.request, after)]
    if running[1] > 1.01 * running[0]:
        return f"keeps {running[1]:,} requests in flight instead of {running[0]:,}"
    old = mean_terms(explain_steps(here.config, cluster, here.request, before))
    new = mean_terms(explain_steps(there.config, cluster, there.request, after))
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
