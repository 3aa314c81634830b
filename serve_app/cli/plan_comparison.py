"""`qwen3-dist plan --compare`: results of `bench serve` beside their predictions, and which term is off."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from qwen3_dist.errors import ConfigError
from serve_app.cli.plan_table import aligned

if TYPE_CHECKING:
    from cluster.hardware import Cluster
    from cluster.planning.comparison import MeasuredRun
    from cluster.planning.planner import PlanRequest
    from qwen3_dist.config import ModelConfig
    from qwen3_dist.layout import Layout

# Terms of a latency, what they come to, and what was measured.
Sample = tuple[Mapping[str, float], float, float]
_MORE_RUNS = "One run does not tell them apart; give --compare runs at several loads."
_FIGURES = {"ttft_ms": "TTFT ms", "itl_ms": "TPOT ms", "tokens_per_s": "tokens/s"}


def run(
    args: argparse.Namespace, config: ModelConfig, cluster: Cluster, request: PlanRequest, out: TextIO
) -> int:
    """Prints the comparison. `cluster` is what ran, `request` has the settings of its engines."""
    from cluster.planning.planner import plan
    from qwen3_dist.layout import Layout

    runs = [read_result(file) for file in args.compare]
    layout = Layout.parse(args.layout or "")
    if args.layout is None:
        lengths = replace(request, input_len=runs[0].input_len, output_len=runs[0].output_len)
        layout = plan(config, cluster, replace(lengths, concurrency=runs[0].most_in_flight))[0].layout
    found = compared(config, layout, cluster, request, runs)
    print(json.dumps(found) if args.json else "\n".join(comparison_lines(found)), file=out)
    return 0


def read_result(file: str) -> MeasuredRun:
    """A result file of `bench serve`, or of `vllm bench serve`. Raises ConfigError if it is none."""
    from cluster.planning.comparison import MeasuredRun

    values = _read(file)
    completed = _number(values, "completed", file)
    if completed < 1:
        raise ConfigError(f"{file}: no request of this run was answered, so there is nothing to compare")
    inputs, outputs = (_number(values, f"total_{name}_tokens", file) for name in ("input", "output"))
    rate = values.get("request_rate", "inf")
    at_most = values.get("max_concurrency")
    rate = None if rate == "inf" else _number(values, "request_rate", file)
    limit = None if at_most is None else int(_number(values, "max_concurrency", file))
    burst = rate is None and (limit is None or limit >= completed)
    average = "median" if burst else "mean"
    output_len = max(1, round(outputs / completed))
    return MeasuredRun(
        file,
        int(completed),
        max(1, round(inputs / completed)),
        output_len,
        None if rate is None or math.isinf(rate) else rate,
        limit,
        _number(values, f"{average}_ttft_ms", file),
        _number(values, f"{average}_tpot_ms", file) if output_len > 1 else None,
        _number(values, "output_throughput", file),
    )


def compared(
    config: ModelConfig,
    layout: Layout,
    cluster: Cluster,
    request: PlanRequest,
    runs: Sequence[MeasuredRun],
) -> dict[str, Any]:
    """The object of `--json`: each run measured and predicted, their terms, and the verdict. Raises ConfigError if the
    layout does not fit."""
    from cluster.planning.comparison import common_term, factors, predict_run

    rows: list[dict[str, Any]] = []
    itl: list[Sample] = []
    ttft: list[Sample] = []
    tokens: list[tuple[float, float]] = []
    for run in runs:
        found = predict_run(config, layout, cluster, request, run)
        pairs = {name: (getattr(run, name), getattr(found, name)) for name in _FIGURES}
        tokens.append((found.tokens_per_s, run.tokens_per_s))
        ttft.append((found.ttft_terms, found.ttft_ms, run.ttft_ms))
        row: dict[str, Any] = {
            "result": run.name,
            "load": _load(run),
            "in_flight": round(found.in_flight, 3),
            "measured": {name: _rounded(pair[0]) for name, pair in pairs.items()},
            "predicted": {name: _rounded(pair[1]) for name, pair in pairs.items()},
            "ratio": {name: _rounded(_ratio(*pair)) for name, pair in pairs.items()},
            "ttft_terms_ms": _terms(found.ttft_terms, factors(*ttft[-1])),
        }
        if run.itl_ms is not None and found.itl_ms is not None:
            itl.append((found.itl_terms, found.itl_ms, run.itl_ms))
            row["itl_terms_ms"] = _terms(found.itl_terms, factors(*itl[-1]))
        rows.append(row)
    return {
        "layout": str(layout),
        "replicas": cluster.replicas(layout.world),
        "runs": rows,
        "verdict": _verdict(ttft, itl, tokens, common_term(itl) if len(itl) > 1 else None),
    }


def comparison_lines(found: Mapping[str, Any]) -> list[str]:
    """`compared` as a table and its verdict."""
    rows = [["result", "load", "", *_FIGURES.values()]]
    for run in found["runs"]:
        named = (Path(run["result"]).name, run["load"])
        for of in ("measured", "predicted", "ratio"):
            cells = [f"{run[of][name]:,.2f}" if run[of][name] is not None else "-" for name in _FIGURES]
            rows.append([*(named if of == "measured" else ("", "")), of, *cells])
    from cluster.planning.fleet import counted

    replicas = counted(found["replicas"], "replica")
    lines = [f"{found['layout']} in {replicas}; ratios are measured over predicted.", ""]
    lines += [*aligned(rows, left=(0, 1, 2)), ""]
    for run in found["runs"]:
        for name, title in (("itl_terms_ms", "TPOT"), ("ttft_terms_ms", "TTFT")):
            shares = ", ".join(f"{term} {each['ms']:.3g}" for term, each in run.get(name, {}).items())
            if shares:
                lines.append(f"{Path(run['result']).name}: predicted {title} in ms: {shares}")
    return [*lines, "", *found["verdict"]]


def _verdict(
    ttft: Sequence[Sample], itl: Sequence[Sample], tokens: Sequence[tuple[float, float]], common: Any
) -> list[str]:
    """Sentences that say which figure is off, and which term would have to change by how much."""
    from cluster.planning.comparison import TOLERANCE, agrees

    off = [sample for sample in itl if not agrees(*sample[1:])]
    lines = []
    if itl and not off:
        lines.append(f"TPOT agrees within {TOLERANCE:.0%}.")
    elif off and common is not None:
        lines.append(_common_sentence(*common))
    elif off:
        lines.append(f"TPOT is {_times(off[0])} the prediction: {_explanations(off[0])}. {_MORE_RUNS}")
    late = [sample for sample in ttft if not agrees(*sample[1:])]
    if not late:
        lines.append(f"TTFT agrees within {TOLERANCE:.0%}.")
    elif off and len(ttft) == 1 and agrees(ttft[0][2] / ttft[0][1], itl[0][2] / itl[0][1]):
        lines.append(f"TTFT is {_times(late[0])} the prediction, as TPOT is: both consist of the same steps.")
    else:
        worst = max(late, key=lambda sample: abs(sample[2] / sample[1] - 1) if sample[1] else 0.0)
        alone = " while TPOT agrees" if itl and not off else ""
        lines.append(
            f"TTFT is {_times(worst)} the prediction{alone}: {_explanations(worst)}. Look at what a request waits for "
            "before its first token: others' prompts, max_num_batched_tokens, the queue in front of the replicas."
        )
    if not off and not late and any(not agrees(*pair) for pair in tokens):
        lines.append(
            "tokens/s is off though both latencies agree: the load was not there all the time. Send at least ten "
            "times as many prompts as are in flight."
        )
    return lines


def _common_sentence(name: str, factor: float, left: float) -> str:
    from cluster.planning.comparison import TOLERANCE

    if left > 2 * TOLERANCE:
        return (
            f"TPOT is off, and no term alone explains all runs: {name} taking {factor:.2f} times as long comes "
            f"nearest and leaves up to {left:.0%}. Run `qwen3-dist calibrate` on the idle machine; plan with its file."
        )
    return (
        f"TPOT is off. {name[0].upper()}{name[1:]} taking {factor:.2f} times as long explains all runs, within "
        f"{left:.0%}."
    )


def _explanations(sample: Sample) -> str:
    """Which terms would have to change by how much, the likeliest first: those that must change least."""
    from cluster.planning.comparison import factors

    terms, predicted, measured = sample
    found = factors(terms, predicted, measured)
    possible = {name: factor for name, factor in found.items() if factor is not None}
    if not possible:
        return "no term alone explains it, so several are too high"
    nearest = sorted(possible, key=lambda name: abs(math.log(possible[name])))[:3]
    first, *others = (f"{name} would have to take {possible[name]:.2f} times as long" for name in nearest)
    return ", or ".join([first, *(other.replace("would have to take ", "") for other in others)])


def _times(sample: Sample) -> str:
    return f"{sample[2] / sample[1]:.2f} times" if sample[1] else "above"


def _load(run: MeasuredRun) -> str:
    lengths = f"{run.input_len} in, {run.output_len} out"
    if run.is_burst:
        return f"{run.num_prompts} at once, {lengths}"
    bounds = [f"{run.rate:g}/s"] if run.rate is not None else []
    bounds += [f"{run.max_concurrency} in flight"] if run.max_concurrency is not None else []
    return ", ".join([*bounds, lengths])


def _terms(
    terms: Mapping[str, float], found: Mapping[str, float | None]
) -> dict[str, dict[str, float | None]]:
    return {name: {"ms": _rounded(value), "factor": _rounded(found[name])} for name, value in terms.items()}


def _ratio(measured: float | None, predicted: float | None) -> float | None:
    return measured / predicted if measured is not None and predicted else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _read(file: str) -> dict[str, Any]:
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read ({error.strerror}); give a file of bench serve --save-result"
        ) from None
    except ValueError:
        values = None
    if not isinstance(values, dict) or "output_throughput" not in values:
        raise ConfigError(
            f"{file} is no result of bench serve; write one with qwen3-dist bench serve --save-result"
        )
    return values


def _number(values: Mapping[str, Any], name: str, file: str) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        what = "has no" if value is None else f"has {value!r} as"
        raise ConfigError(f"{file} {what} {name}, which must be a number; measure again with bench serve")
    return float(value)
