"""Fits the constants of the GPU presets to measured points, and writes `cluster/fitted.json`.

The cost is the mean of the relative errors of TTFT and TPOT, as it is reported, but squared where they are small
(pseudo-Huber). It is minimised by Gauss and Newton's method with Levenberg's damping. Constants are the same for all
engines, models and layouts. Those of quantised weights are of a device and a kind of weights. Each stays between
bounds. The error to expect is found by leaving out one workload (lengths of prompt and output) at a time: the
constants then are those of one more step of Newton without its points.
"""

from __future__ import annotations

import copy
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.published.points import KINDS, Point
from benchmarks.published.predictions import predicted
from cluster.hardware import PRESETS, Cluster, fitted_weights

Vector = npt.NDArray[np.float64]
Constants = dict[str, Any]

# Lowest and highest value of each constant: what is plausible.
_SHARED = {
    ("expert_imbalance",): (1.0, 2.0),
    ("expert_evenness",): (0.05, 5.0),
    ("device", "read_efficiency"): (0.0, 0.95),
    ("device", "kv_read_efficiency"): (0.0, 0.95),
    ("device", "flops_efficiency"): (0.0, 0.85),
    ("device", "attention_efficiency"): (0.0, 0.8),
    ("link", "latency_s"): (0.0, 2e-5),
    ("link", "efficiency"): (0.0, 0.95),
    ("step", "step_overhead_s"): (0.0, 3e-3),
    ("step", "sequence_overhead_s"): (0.0, 1e-4),
    ("step", "token_overhead_s"): (0.0, 2e-5),
    ("step", "layer_overhead_s"): (0.0, 5e-5),
    ("step", "prompt_layer_overhead_s"): (0.0, 1e-3),
    ("step", "idle_step_overhead_s"): (0.0, 2e-3),
    ("step", "idle_sequence_overhead_s"): (0.0, 5e-5),
    ("step", "request_overhead_s"): (0.0, 0.08),
    ("step", "request_token_overhead_s"): (0.0, 1e-4),
}
_OF_WEIGHTS = {
    "speed": (0.0, 4.0),
    "read_efficiency": (0.0, 0.95),
    "expert_efficiency": (0.0, 1.0),
    "expert_read_efficiency": (0.0, 1.0),
    "idle_expert_reads": (0.0, 1.0),
    "expert_layer_overhead_s": (0.0, 5e-4),
}
_FEW = 10  # points of a kind of weights on a device: from fewer, only its speed is fitted
_OUTLIER = 0.05  # beyond this relative error the cost grows linearly
_PRIOR = 0.003  # holds constants of which the points tell nothing in the middle of their bounds
_STEEPEST = 1.5  # logarithmic error, beyond which the slope of a relative error is taken for no steeper
_STEP = 0.15  # of the differences that stand for derivatives


@dataclass(frozen=True)
class Fit:
    """Fitted constants, and the cross-validated errors: logarithms [points, 2] of predicted over measured TTFT and
    TPOT."""

    constants: Constants
    errors: Vector


def fit(points: Sequence[Point], start: Constants, report: Callable[[str], None], most: int = 15) -> Fit:
    """Fits `start` to the points, in `most` steps at most."""
    problem = _Problem(points, start)
    x = problem.free_numbers()
    errors, damping = problem.errors(x), 0.01
    for step in range(most):
        slopes, cost = problem.slopes(x, errors), _cost(errors, x)
        for _ in range(8):
            moved = x + _newton(slopes, errors, x, damping)
            found = problem.errors(moved)
            if _cost(found, moved) < cost:
                break
            damping *= 4
        else:
            break
        x, errors, damping = moved, found, damping / 20
        report(f"step {step}: cost {_cost(errors, x):.3f}, {_shown(errors)}")
        if _cost(errors, x) > 0.9998 * cost:
            break
    left_out = _left_out(problem, x, errors)
    report(f"left out in turn: {_shown(left_out)}")
    return Fit(problem.constants(x), left_out.reshape(-1, 2))


def cluster_with(constants: Constants, device: str) -> Cluster:
    """The preset of `device` with other constants."""
    preset = PRESETS[device]
    weights = fitted_weights(constants, device)
    return replace(
        preset,
        device=replace(preset.device, **constants["device"], **weights),
        inside=replace(preset.inside, **constants["link"]),
        **constants["step"],
    )


class _Problem:
    """The points, and the constants to fit as numbers without bounds."""

    def __init__(self, points: Sequence[Point], start: Constants) -> None:
        self.points, self._start = points, start
        self._bounds: dict[tuple[str, ...], tuple[float, float]] = dict(_SHARED)
        quantised = [point for point in points if point.weights in KINDS]
        kinds = Counter((point.device, KINDS[point.weights]) for point in quantised)
        moe = Counter((point.device, KINDS[point.weights]) for point in quantised if point.has_experts)
        for (device, kind), count in kinds.items():
            for name, bounds in _OF_WEIGHTS.items():
                enough = moe[device, kind] >= _FEW if "expert" in name else count >= _FEW
                if enough or name == "speed":
                    self._bounds["weights", device, kind, name] = bounds

    def free_numbers(self) -> Vector:
        """Those of the constants to start from."""
        numbers = []
        for path, (low, high) in self._bounds.items():
            share = min(max((_part(self._start, path).get(path[-1], low) - low) / (high - low), 0.02), 0.98)
            numbers.append(math.log(share / (1 - share)))
        return np.array(numbers)

    def constants(self, x: Vector) -> Constants:
        """The constants that the numbers stand for, to four digits."""
        found = copy.deepcopy(self._start)
        for (path, (low, high)), value in zip(self._bounds.items(), x, strict=True):
            _part(found, path)[path[-1]] = float(f"{low + (high - low) / (1 + math.exp(-value)):.4g}")
        return found

    def errors(self, x: Vector, chosen: Sequence[int] | None = None) -> Vector:
        """Logarithms of predicted over measured TTFT and TPOT, in turn, of the chosen points; None: of all."""
        constants = self.constants(x)
        points = self.points if chosen is None else [self.points[index] for index in chosen]
        clusters = {device: cluster_with(constants, device) for device in {point.device for point in points}}
        errors = []
        for point in points:
            routing = (constants["expert_imbalance"], constants["expert_evenness"])
            seen = predicted(point, clusters[point.device], *routing)
            errors += [math.log(1e3 * seen.ttft_s / point.ttft_ms)]
            errors += [math.log(1e3 * seen.itl_s / point.tpot_ms)]
        return np.array(errors)

    def slopes(self, x: Vector, errors: Vector) -> Vector:
        """Changes of the errors with each number [2 * points, numbers]."""
        slopes = np.zeros((len(errors), len(x)))
        for column, path in enumerate(self._bounds):
            chosen = [index for index, point in enumerate(self.points) if _concerns(path, point)]
            rows, moved = _rows(chosen), x.copy()
            moved[column] += _STEP if x[column] < 0 else -_STEP
            change = self.errors(moved, chosen) - errors[rows]
            slopes[rows, column] = change / (moved[column] - x[column])
        return np.clip(slopes, -2, 2)  # where a queue begins, a difference is no derivative


def _left_out(problem: _Problem, x: Vector, errors: Vector) -> Vector:
    """Errors of each workload's points with constants that they had no part in."""
    slopes = problem.slopes(x, errors)
    workloads = defaultdict(list)
    for index, point in enumerate(problem.points):
        workloads[point.input_len, point.output_len].append(index)
    found = errors.copy()
    for indices in workloads.values():
        rows = _rows(indices)
        kept = np.ones(len(errors), dtype=bool)
        kept[rows] = False
        moved = x + _newton(slopes[kept], errors[kept], x, 1e-3)
        found[rows] = problem.errors(moved, indices)
    return found


def _part(constants: Constants, path: tuple[str, ...]) -> dict[str, Any]:
    """The innermost mapping of a constant's path; made if it is not there."""
    for name in path[:-1]:
        constants = constants.setdefault(name, {})
    return constants


def _concerns(path: tuple[str, ...], point: Point) -> bool:
    """Whether the point's prediction depends on the constant."""
    return path[0] != "weights" or path[1:3] == (point.device, KINDS.get(point.weights))


def _rows(indices: Sequence[int]) -> npt.NDArray[np.intp]:
    return np.array([2 * index + part for index in indices for part in (0, 1)], dtype=np.intp)


def _newton(slopes: Vector, errors: Vector, x: Vector, damping: float) -> Vector:
    slopes, errors = slopes * np.exp(np.minimum(errors, _STEEPEST))[:, None], np.expm1(errors)
    weights = 1 / np.sqrt(1 + (errors / _OUTLIER) ** 2)
    curvature = slopes.T @ (weights[:, None] * slopes)
    gradient = slopes.T @ (weights * errors) + 2 * _PRIOR * x
    damped = curvature + np.diag(2 * _PRIOR + damping * (curvature.diagonal() + 0.01))
    return np.clip(-np.linalg.solve(damped, gradient), -1.2, 1.2)


def _cost(errors: Vector, x: Vector) -> float:
    strict = _OUTLIER**2 * (np.sqrt(1 + (np.expm1(errors) / _OUTLIER) ** 2) - 1)
    return float(strict.sum() + _PRIOR * (x**2).sum())


def _shown(errors: Vector) -> str:
    off = np.abs(np.exp(errors.reshape(-1, 2)) - 1).mean(axis=0)
    return f"TTFT off by {off[0]:.1%}, TPOT by {off[1]:.1%}"
