"""Runs steps of the real engine on this machine and measures where their time goes, beside predictions."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from cluster.planning.cost_model import CostModel, StepShape
from qwen3_dist.engine.engine import Engine
from qwen3_dist.protocol.step_limits import SchedulerLimits
from qwen3_dist.sampling_params import SamplingParams
from qwen3_dist.settings import EngineConfig

_WARM_UP, _STEPS, _MOST_STEPS = 3, 20, 60  # decode steps
_PROMPTS = 5  # prompt steps
OWN, JOINED, OUTSIDE = "step overhead", "kernels that join operations", "outside of the ranks"
_OVERHEADS = ("overhead", "layer overhead")

Operations = dict[str, float]


@dataclass(frozen=True)
class MeasuredStep:
    """A kind of step, in seconds. `seconds` is its length as served, of which `rank_s` is spent in a rank's step.

    `operations` are those of a rank whose kernels are taken apart, so they add up to more than `rank_s` where kernels
    join several operations. Under pp all are sums over the stages.
    """

    kind: str
    shape: StepShape
    seconds: float
    rank_s: float
    operations: Operations


@dataclass(frozen=True)
class Compared:
    """A measured step beside its prediction, in seconds.

    `operations` are pairs of measured and predicted, None for what the other does not know. What the measured ones add
    up to differs from the step by JOINED, what kernels save that join several operations, and OUTSIDE, what passes
    outside of the ranks' steps.
    """

    measured: MeasuredStep
    predicted_s: float
    operations: dict[str, tuple[float | None, float | None]]

    @classmethod
    def of(cls, measured: MeasuredStep, model: CostModel) -> Compared:
        """The predicted overheads of steps and layers are set beside the step's own in the ranks."""
        found = {**measured.operations, JOINED: measured.rank_s - sum(measured.operations.values())}
        found[OUTSIDE] = measured.seconds - measured.rank_s
        predicted: Operations = {}
        for name, seconds in model.step_parts(measured.shape).items():
            name = OWN if name in _OVERHEADS else name
            predicted[name] = predicted.get(name, 0.0) + seconds
        names = [name for name in {**predicted, **found} if name not in (JOINED, OUTSIDE)]
        names.sort(key=lambda name: -found.get(name, 0.0))
        rows = {name: (found.get(name), predicted.get(name)) for name in [*names, JOINED, OUTSIDE]}
        return cls(measured, model.step_seconds(measured.shape), rows)

    def as_json(self) -> dict[str, object]:
        def ms(seconds: float | None) -> float | None:
            return None if seconds is None else round(1e3 * seconds, 4)

        return {
            "kind": self.measured.kind,
            "shape": asdict(self.measured.shape),
            "measured_ms": ms(self.measured.seconds),
            "predicted_ms": ms(self.predicted_s),
            "operations": {
                name: {"measured_ms": ms(measured), "predicted_ms": ms(predicted)}
                for name, (measured, predicted) in self.operations.items()
            },
        }


def measure_steps(config: EngineConfig, sequences: int, context: int, prompt_len: int) -> list[MeasuredStep]:
    """Measures the decode step of `sequences` sequences in each dp group with about `context` tokens each, and the
    step of one prompt in each dp group, of `prompt_len` tokens or as many as fit into a step.

    Raises what `Engine` raises.
    """
    engine = Engine(replace(config, prefix_caching=False))
    try:
        budget = SchedulerLimits.of(engine.config, "cpu", 1).max_num_batched_tokens
        decode = _decode_step(engine, sequences, context, budget)
        return [decode, _prompt_step(engine, min(prompt_len, budget))]
    finally:
        engine.shutdown()


def _decode_step(engine: Engine, sequences: int, context: int, budget: int) -> MeasuredStep:
    outputs = _MOST_STEPS + sequences * context // budget  # the first sequences decode while others begin
    length = max(1, min(context - _STEPS, engine.max_model_len - outputs))
    batch = _Batch(engine, sequences * engine.config.layout.dp, length, outputs)
    batch.decode(_WARM_UP)
    found = _measure(engine, "decode", lambda: batch.decode(_STEPS))
    tokens = sequences * length + batch.total // engine.config.layout.dp - sequences * _STEPS
    batch.end()
    return MeasuredStep("decode", StepShape(sequences, tokens, 0, 0, sequences), *found)


def _prompt_step(engine: Engine, length: int) -> MeasuredStep:
    def prompts() -> float:
        for _ in range(_PROMPTS):
            _Batch(engine, engine.config.layout.dp, length, 1).end()
        return _PROMPTS

    prompts()
    shape = StepShape(0, 0, length, length * (length + 1) // 2, 1)
    return MeasuredStep("prompt", shape, *_measure(engine, "prompt", prompts))


def _measure(engine: Engine, kind: str, run: Callable[[], float]) -> tuple[float, float, Operations]:
    """The last three fields of a MeasuredStep. `run` makes steps and returns their number."""
    engine.paces.start_profile(False)
    started = time.perf_counter()
    steps = run()
    seconds = (time.perf_counter() - started) / steps
    rank_s = sum(_of_rank(engine, steps).values())
    engine.paces.start_profile(True)
    operations = _of_rank(engine, run())
    named = {
        f"attention of {kind}s" if name == "attention" else name: each for name, each in operations.items()
    }
    return seconds, rank_s, named


def _of_rank(engine: Engine, steps: float) -> Operations:
    """Ends the profile. Seconds of a step by operation: the mean of a stage's ranks, summed over the stages."""
    sums: Operations = {}
    for launched, operations in engine.paces.end_profile():
        micro_batches = max(1, round(launched / steps))
        for name, seconds in operations.items():
            of_step = seconds / launched * micro_batches
            sums[name] = sums.get(name, 0.0) + of_step / engine.config.layout.stage_size
    return sums


class _Batch:
    """Random sequences of `length` tokens in an engine."""

    def __init__(self, engine: Engine, count: int, length: int, outputs: int) -> None:
        self._engine = engine
        rng, vocabulary = random.Random(count), engine.model_config.vocab_size
        self._made = {f"measured {number}": 0 for number in range(count)}
        params = SamplingParams(max_tokens=outputs, temperature=0, ignore_eos=True)
        for name in self._made:
            engine.add_request(name, [rng.randrange(vocabulary) for _ in range(length)], params)

    def decode(self, tokens: int) -> float:
        """Steps until each sequence has made so many tokens more. Returns the tokens of the mean sequence."""
        before, wanted = self.total, min(self._made.values()) + tokens
        while min(self._made.values()) < wanted:
            self._step()
        return (self.total - before) / len(self._made)

    def end(self) -> None:
        """Ends what has not ended by itself."""
        while self._engine.has_work and min(self._made.values()) < 1:
            self._step()
        for name in self._made:
            self._engine.abort(name)
        while self._engine.has_work:
            self._engine.step()

    @property
    def total(self) -> int:
        """Tokens that all sequences have made."""
        return sum(self._made.values())

    def _step(self) -> None:
        for name, deltas in self._engine.step().items():
            self._made[name] += sum(len(delta.token_ids) for delta in deltas)
