"""Fits the constants of the GPU presets to measured points, and writes `cluster/fitted.json`.

Least squares of the logarithms of predicted over measured TTFT and TPOT, less strict with outliers (pseudo-Huber), by
Gauss and Newton's method with Levenberg's damping. Constants are the same for all engines, models and layouts. Each
stays between 0 and a highest value. The error to expect is found by leaving out one workload (lengths of prompt and
output) at a time: the constants then are those of one more step of Newton without its points.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.published.points import Point
from benchmarks.published.predictions import predicted
from cluster.hardware import PRESETS, Cluster, WeightRates

Vector = npt.NDArray[np.float64]

# Where each constant lies in `cluster/fitted.json`: its highest value. The highest of a share is what is plausible.
HIGHEST = {
    ("device", "read_efficiency"): 0.95,
    ("device", "kv_read_efficiency"): 0.95,
    ("device", "flops_efficiency"): 0.85,
    ("device", "attention_efficiency"): 0.8,
    ("link", "latency_s"): 2e-5,
    ("link", "efficiency"): 0.95,
    ("step", "step_overhead_s"): 3e-3,
    ("step", "sequence_overhead_s"): 1e-4,
    ("step", "layer_overhead_s"): 5e-5,
    ("step", "prompt_layer_overhead_s"): 1e-3,
    ("step", "request_overhead_s"): 0.08,
    ("fp8", "speed"): 2.0,
    ("fp8", "read_efficiency"): 0.95,
    ("fp8", "expert_efficiency"): 1.0,
    ("fp8", "expert_read_efficiency"): 1.0,
    ("fp8", "idle_expert_reads"): 1.0,
    ("fp8", "expert_layer_overhead_s"): 5e-4,
    ("fp8_block", "speed"): 2.0,
    ("fp8_block", "read_efficiency"): 0.95,
    ("fp8_block", "expert_efficiency"): 1.0,
    ("fp8_block", "expert_read_efficiency"): 1.0,
    ("fp8_block", "idle_expert_reads"): 1.0,
    ("fp8_block", "expert_layer_overhead_s"): 5e-4,
    ("fp4", "speed"): 4.0,
}
_OUTLIER = 0.15  # beyond this logarithmic error the cost grows linearly
_PRIOR = 0.01  # holds constants that no point tells anything about in the middle
_STEP = 0.15  # of the differences that stand for derivatives

Constants = dict[str, Any]


@dataclass(frozen=True)
class Fit:
    """Fitted constants, and the cross-validated errors: logarithms [points, 2] of predicted over measured TTFT and
    TPOT."""

    constants: Constants
    errors: Vector


def fit(points: Sequence[Point], start: Constants, report: Callable[[str], None], most: int = 15) -> Fit:
    """Fits `start` to the points, in `most` steps at most."""
    x = np.array([_free(highest, _at(start, place)) for place, highest in HIGHEST.items()])
    errors, damping = _errors(points, start, x), 0.01
    for step in range(most):
        slopes = _slopes(points, start, x, errors)
        cost = _cost(errors, x)
        for _ in range(8):
            moved = x + _newton(slopes, errors, x, damping)
            found = _errors(points, start, moved)
            if _cost(found, moved) < cost:
                break
            damping *= 4
        else:
            break
        x, errors, damping = moved, found, damping / 20
        report(f"step {step}: cost {_cost(errors, x):.3f}, {_shown(errors)}")
        if _cost(errors, x) > 0.998 * cost:
            break
    slopes = _slopes(points, start, x, errors)
    left_out = _left_out(points, start, x, errors, slopes)
    report(f"left out in turn: {_shown(left_out)}")
    return Fit(_constants(start, x), left_out.reshape(-1, 2))


def cluster_with(constants: Constants, device: str) -> Cluster:
    """The preset of `device` with other constants."""
    preset = PRESETS[device]
    weights = {kind: WeightRates(**rates) for kind, rates in constants["weights"].items()}
    link = constants["link"]
    return replace(
        preset,
        device=replace(preset.device, **constants["device"], **weights),
        inside=replace(preset.inside, latency_s=link["latency_s"], efficiency=link["efficiency"]),
        **constants["step"],
    )


def _left_out(points: Sequence[Point], start: Constants, x: Vector, errors: Vector, slopes: Vector) -> Vector:
    """Errors of each workload's points with constants that they had no part in."""
    workloads = defaultdict(list)
    for index, point in enumerate(points):
        workloads[point.input_len, point.output_len].append(index)
    found = errors.copy()
    for of_workload in workloads.values():
        rows = np.array([2 * index + part for index in of_workload for part in (0, 1)])
        kept = np.ones(len(errors), dtype=bool)
        kept[rows] = False
        moved = x + _newton(slopes[kept], errors[kept], x, 1e-3)
        found[rows] = _errors([points[index] for index in of_workload], start, moved)
    return found


def _errors(points: Sequence[Point], start: Constants, x: Vector) -> Vector:
    constants = _constants(start, x)
    clusters = {device: cluster_with(constants, device) for device in {point.device for point in points}}
    errors = []
    for point in points:
        seen = predicted(point, clusters[point.device], constants["expert_imbalance"])
        errors += [math.log(1e3 * seen.ttft_s / point.ttft_ms), math.log(1e3 * seen.itl_s / point.tpot_ms)]
    return np.array(errors)


def _slopes(points: Sequence[Point], start: Constants, x: Vector, errors: Vector) -> Vector:
    slopes = np.empty((len(errors), len(x)))
    for column, value in enumerate(x):
        moved = x.copy()
        moved[column] += _STEP if value < 0 else -_STEP
        slopes[:, column] = (_errors(points, start, moved) - errors) / (moved[column] - value)
    return np.clip(slopes, -2, 2)  # where a queue begins, a difference is no derivative


def _newton(slopes: Vector, errors: Vector, x: Vector, damping: float) -> Vector:
    weights = 1 / np.sqrt(1 + (errors / _OUTLIER) ** 2)
    curvature = slopes.T @ (weights[:, None] * slopes)
    gradient = slopes.T @ (weights * errors) + 2 * _PRIOR * x
    damped = curvature + np.diag(2 * _PRIOR + damping * (curvature.diagonal() + 0.01))
    return np.clip(-np.linalg.solve(damped, gradient), -1.2, 1.2)


def _cost(errors: Vector, x: Vector) -> float:
    strict = _OUTLIER**2 * (np.sqrt(1 + (errors / _OUTLIER) ** 2) - 1)
    return float(strict.sum() + _PRIOR * (x**2).sum())


def _shown(errors: Vector) -> str:
    off = np.abs(np.exp(errors.reshape(-1, 2)) - 1).mean(axis=0)
    return f"TTFT off by {off[0]:.1%}, TPOT by {off[1]:.1%}"


def _at(constants: Constants, place: tuple[str, str]) -> float:
    return float(_part(constants, place[0])[place[1]])


def _part(constants: Constants, name: str) -> dict[str, float]:
    part: dict[str, float] = constants[name] if name in constants else constants["weights"][name]
    return part


def _free(highest: float, value: float) -> float:
    """A number without bounds for a constant between 0 and `highest`."""
    share = min(max(value / highest, 0.02), 0.98)
    return math.log(share / (1 - share))


def _constants(start: Constants, x: Vector) -> Constants:
    """`start` with the constants that the free numbers `x` stand for, to three digits."""
    found = {
        **start,
        **{name: dict(start[name]) for name in ("device", "link", "step")},
        "weights": {kind: dict(rates) for kind, rates in start["weights"].items()},
    }
    for (place, highest), value in zip(HIGHEST.items(), x, strict=True):
        _part(found, place[0])[place[1]] = float(f"{highest / (1 + math.exp(-value)):.4g}")
    return found
