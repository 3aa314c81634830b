"""A step-time model fitted to measured steps, used by the simulator instead of the cost model."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.planning.cost_model import StepShape
from qwen3_dist.engine.engine import Engine
from qwen3_dist.sampling_params import SamplingParams

_KNOTS = (1, 8, 32, 128, 512, 1024)  # rows between which a step's time is a line
_DECODES = (1, 3, 8, 32)
_CONTEXTS = (32, 256)
_CHUNKS = (16, 60, 130, 250, 500, 800)
_DECODE_STEPS = 6  # measured for each batch

Measured = tuple[StepShape, float]


@dataclass(frozen=True)
class FittedCost:
    """Step time: piecewise linear in its rows, plus linear terms in decodes and in their context tokens.

    Fitted by relative error, since steps differ a hundredfold, with non-negative coefficients. Attention in prefill
    has no term of its own: it is a small part for prompts as short as these.
    """

    coefficients: tuple[float, ...]
    median_error: float  # of the steps it was fitted to

    @classmethod
    def of(cls, steps: Sequence[Measured]) -> FittedCost:
        features = np.array([_features(shape) for shape, _ in steps])
        seconds = np.array([measured for _, measured in steps])
        found = _without_negatives(features / seconds[:, None])
        errors = np.abs(features @ found / seconds - 1)
        return cls(tuple(float(value) for value in found), float(np.median(errors)))

    def step_seconds(self, shape: StepShape) -> float:
        pairs = zip(self.coefficients, _features(shape), strict=True)
        return max(1e-6, sum(coefficient * feature for coefficient, feature in pairs if feature))


def measure_steps(engine: Engine, seed: int) -> list[Measured]:
    """Measures steps of known shapes: decodes, decodes with a prompt, and prompts alone."""
    rng = random.Random(seed)
    steps: list[Measured] = []
    for chunk in _CHUNKS:
        _Batch(engine, rng).timed_step(chunk)  # warm-up
    for count in _DECODES:
        for context in _CONTEXTS:
            batch = _Batch(engine, rng)
            batch.start(count, context)
            steps += [batch.timed_step() for _ in range(_DECODE_STEPS)]
            steps += [batch.timed_step(chunk) for chunk in _CHUNKS]
            batch.end()
    steps += [_Batch(engine, rng).timed_step(chunk) for chunk in _CHUNKS]
    return steps


class _Batch:
    """Decoding sequences of known lengths in an engine."""

    def __init__(self, engine: Engine, rng: random.Random) -> None:
        self._engine = engine
        self._rng = rng
        self._lengths: dict[str, int] = {}  # tokens of each decoding sequence

    def start(self, count: int, length: int) -> None:
        for _ in range(count):
            self._add(length, outputs=1000)
        while len(self._lengths) < count:
            for name in self._engine.step():
                self._lengths[name] = self._lengths.get(name, length) + 1

    def timed_step(self, chunk: int = 0) -> Measured:
        """Times a step of all sequences, with a new prompt of `chunk` tokens that finishes in it."""
        if chunk:
            self._add(chunk, outputs=1)
        decodes, context = len(self._lengths), sum(self._lengths.values())
        shape = StepShape(decodes, context, chunk, chunk * (chunk + 1) // 2, decodes + (chunk > 0))
        started = time.perf_counter()
        outputs = self._engine.step()
        seconds = time.perf_counter() - started
        assert len(outputs) == shape.num_samples, "the step did not have the expected shape"
        for name in self._lengths:
            self._lengths[name] += 1
        return shape, seconds

    def end(self) -> None:
        for name in self._lengths:
            self._engine.abort(name)
        self._lengths.clear()

    def _add(self, length: int, outputs: int) -> None:
        tokens = [self._rng.randrange(self._engine.model_config.vocab_size) for _ in range(length)]
        params = SamplingParams(max_tokens=outputs, temperature=0, ignore_eos=True)
        self._engine.add_request(f"fit{self._rng.getrandbits(60)}", tokens, params)


def _features(shape: StepShape) -> list[float]:
    rows = shape.num_decodes + shape.prefill_tokens
    return [
        *_shares(rows),
        float(shape.num_decodes),
        float(shape.decode_context_tokens),
    ]


def _without_negatives(relative: np.ndarray) -> np.ndarray:
    """Least squares of `relative @ x = 1`, leaving out features until no coefficient is negative."""
    kept = [column for column in range(relative.shape[1]) if relative[:, column].any()]
    found = np.zeros(relative.shape[1])
    while kept:
        solution, *_ = np.linalg.lstsq(relative[:, kept], np.ones(len(relative)), rcond=None)
        if (solution >= 0).all():
            found[kept] = solution
            break
        kept.pop(int(np.argmin(solution * np.linalg.norm(relative[:, kept], axis=0))))
    return found


def _shares(rows: int) -> list[float]:
    """Interpolation weights of the knots for a number of rows; beyond the last knot, proportional to rows."""
    shares = [0.0] * len(_KNOTS)
    for place, (low, high) in enumerate(zip(_KNOTS, _KNOTS[1:], strict=False)):
        if low <= rows <= high:
            shares[place + 1] = (rows - low) / (high - low)
            shares[place] = 1 - shares[place + 1]
            return shares
    shares[-1 if rows > 1 else 0] = rows / _KNOTS[-1] if rows > 1 else 1.0
    return shares
