"""A replica whose steps take a given time and no CPU time, so that what is measured is the server.

Everything but the model is real: scheduler, ranks' processes, sockets, text, HTTP. A rank answers each plan with
tokens that it did not compute, after STEP_S or after as long as a function of the plan says.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from qwen3_dist.launch.launcher import Launcher
from qwen3_dist.protocol.channel import Channel
from qwen3_dist.protocol.messages import Answer, Call, RankSpec
from qwen3_dist.protocol.step_plan import StepPlan, StepResult
from qwen3_dist.worker import rank
from qwen3_dist.worker.runner import ModelRunner
from serve_app.replica.deployment import EngineReplica
from serve_app.settings import ReplicaSettings

STEP_S = 0.02
_FIRST_TOKEN, _NUM_TOKENS = 300, 500  # token ids that are words of the bundled tokenizer


def paced_rank(spec: RankSpec) -> None:
    """Runs a rank whose steps take STEP_S seconds, on the last core."""
    os.sched_setaffinity(0, {(os.cpu_count() or 1) - 1})
    run_rank(spec, lambda plan: STEP_S)


def run_rank(spec: RankSpec, seconds: Callable[[StepPlan], float]) -> None:
    """Runs a rank of which the step of a plan takes `seconds(plan)`."""
    rank.run_steps = partial(_run_paced_steps, seconds)
    rank.rank_main(spec)


def pace(main: Callable[[RankSpec], None] = paced_rank) -> None:
    """Makes engines that this process starts paced ones, whose ranks run `main`."""
    Launcher.main = staticmethod(main)


class PacedReplica(EngineReplica):
    """An EngineReplica with a paced engine."""

    def __init__(self, settings: ReplicaSettings) -> None:
        pace()
        super().__init__(settings)


def _run_paced_steps(
    seconds: Callable[[StepPlan], float], channel: Channel, runner: ModelRunner, overlaps: bool, activity: Any
) -> None:
    while (message := channel.receive()) is not None:
        if isinstance(message, Call):
            channel.send(Answer(getattr(runner, message.method)(*message.arguments)))
            continue
        end_s = time.perf_counter() + seconds(message)
        result = _sample(message)
        time.sleep(max(0.0, end_s - time.perf_counter()))
        channel.send(result)


def _sample(plan: StepPlan) -> StepResult:
    specs = [spec for sequence in plan.sequences if sequence.sample for spec in sequence.sample_specs]
    tokens = tuple(_FIRST_TOKEN + spec.position % _NUM_TOKENS for spec in specs)
    return StepResult(plan.step, tokens, (None,) * len(tokens))
