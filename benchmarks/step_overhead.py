"""Round trip of a step without a model: plan to two ranks, result back.

    python -m benchmarks.step_overhead

The same run measures a call of a Ray actor with the same plan.
"""

from __future__ import annotations

import argparse
import pickle
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import ray

from benchmarks.record import keep, microseconds
from qwen3_dist.launch.launcher import Launcher
from qwen3_dist.launch.rank_group import RankGroupExecutor
from qwen3_dist.layout import Layout
from qwen3_dist.protocol.channel import connect
from qwen3_dist.protocol.messages import Hello, Loaded, RankSpec, Ready, StatusHello
from qwen3_dist.protocol.step_plan import SampleSpec, SequenceStep, StepPlan, StepResult
from qwen3_dist.settings import EngineConfig


def decode_plan(sequences: int, context: int = 512) -> StepPlan:
    """A plan that decodes `sequences` sequences of `context` tokens, without new blocks."""
    steps = (
        SequenceStep(i, i, (7,), context - 1, (), SampleSpec(0.6, 0.95, 20, i, context, None))
        for i in range(sequences)
    )
    return StepPlan.for_groups(1, [tuple(steps)])[0]


def answer(plan: StepPlan) -> StepResult:
    return StepResult(plan.step, (7,) * len(plan.sequences), (None,) * len(plan.sequences))


def echo_rank(spec: RankSpec) -> None:
    """A rank without a model: rank 0 answers every plan at once."""
    channel, status = (connect(spec.address, spec.secret) for _ in range(2))
    status.send(StatusHello(spec.rank))
    channel.send(Hello(spec.rank, 0, channel.local_host, "host", "host", None, 1))
    channel.receive()
    channel.send(Loaded(1))
    channel.receive()
    channel.send(Ready("echo"))
    while (plan := channel.receive()) is not None:
        if spec.rank == 0:
            channel.send(answer(plan))


class EchoLauncher(Launcher):
    """Two echo ranks as processes of this host."""

    def __init__(self) -> None:
        self.host, self.device = "127.0.0.1", "cpu"
        self._processes: list[subprocess.Popen[bytes]] = []

    def launch(self, specs: list[RankSpec]) -> None:
        for spec in specs:
            process = subprocess.Popen([sys.executable, "-m", __spec__.name, "rank"], stdin=subprocess.PIPE)
            assert process.stdin is not None
            process.stdin.write(pickle.dumps(spec))
            process.stdin.close()
            self._processes.append(process)

    def exit_reason(self, seats: Mapping[int, int]) -> str | None:
        return None

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


class EchoActor:
    def step(self, plan: StepPlan) -> StepResult:
        return answer(plan)


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    executor = RankGroupExecutor(EngineConfig(layout=Layout(tp=2)), EchoLauncher())
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    actor: Any = ray.remote(EchoActor).remote()
    rows = []
    for sequences in (1, 16, 64):
        plan = decode_plan(sequences)
        ours = microseconds(lambda plan=plan: executor.execute([plan]), 2000)
        rays = microseconds(lambda plan=plan: ray.get(actor.step.remote(plan)), 500)
        rows.append(
            {
                "sequences": sequences,
                "executor_world2_p50_us": ours["p50_us"],
                "executor_world2_p99_us": ours["p99_us"],
                "ray_actor_p50_us": rays["p50_us"],
                "ray_over_executor": round(rays["p50_us"] / ours["p50_us"], 1),
            }
        )
    executor.shutdown()
    ray.shutdown()
    keep("step-overhead", rows)


if __name__ == "__main__":
    if sys.argv[1:] == ["rank"]:
        echo_rank(pickle.loads(sys.stdin.buffer.read()))
    else:
        main()
