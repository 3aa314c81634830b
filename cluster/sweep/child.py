"""The process in which a sweep runs one layout: reads its job from stdin, prints its result as JSON on stdout."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable
from typing import Any

from cluster.sweep.run import SweepPoint, SweepWorkload
from qwen3_dist.benchmark import Workload, measure
from qwen3_dist.engine.engine import Engine
from qwen3_dist.errors import QwenDistError
from qwen3_dist.layout import Layout

_KEPT = ("output_tokens_per_s", "total_tokens_per_s", "ttft_ms", "itl_ms", "steps", "preemptions")
_WARM_UP_TOKENS = 4  # of each answer before the first repeat of a point
_UNUSED_SEED = 2**31 - 1  # of no repeat
Job = dict[str, Any]


def run(job: Job) -> dict[str, Any]:
    """The figures of each repeat of each point, or `error` if the engine does not start."""
    workload, address = read_job(job), job["ray_address"]
    config = workload.engine_config(
        job["model"], job["random_weights"], Layout.parse(job["layout"]), address is not None
    )
    with contextlib.ExitStack() as stack:
        if address is not None:
            from cluster.ray_cluster import joined

            stack.enter_context(joined(address))
        engine = Engine(config)
        stack.callback(engine.shutdown)
        return measured(workload, lambda point, seed: _figures(engine, point, seed)) | {
            "backends": engine.backends,
            "collectives": engine.collectives,
            "hosts": [rank.host for rank in engine.ranks],
        }


def read_job(job: Job) -> SweepWorkload:
    values = job["workload"]
    points = tuple(SweepPoint(**point) for point in values.pop("points"))
    return SweepWorkload(points, **values)


def measured(
    workload: SweepWorkload, measure_one: Callable[[SweepPoint, int], dict[str, Any]]
) -> dict[str, Any]:
    """All repeats of all points, each with a seed of its own. What all have in common stands once."""
    points, about = [], {}
    for point in workload.points:
        repeats = [measure_one(point, seed) for seed in range(workload.repeats)]
        for figures in repeats:
            for name in {"hardware", "versions"} & set(figures):
                about[name] = figures.pop(name)
        points.append({"point": str(point), "repeats": repeats})
    return {"points": points, **about}


def answer(run: Callable[[Job], dict[str, Any]]) -> None:
    """Runs the job on stdin. What others print goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        try:
            found = run(json.loads(sys.stdin.read()))
        except QwenDistError as error:
            found = {"error": str(error)}
    print(json.dumps(found))


def _figures(engine: Engine, point: SweepPoint, seed: int) -> dict[str, Any]:
    if seed == 0:  # steps of new sizes take longer the first time
        tokens = min(_WARM_UP_TOKENS, point.output_len)
        measure(engine, Workload(point.num_prompts, point.input_len, tokens, seed=_UNUSED_SEED))
    workload = Workload(
        point.num_prompts, point.input_len, point.output_len, seed=seed, rate=point.rate or math.inf
    )
    found = measure(engine, workload)
    return {name: found[name] for name in (*_KEPT, "hardware", "versions")}


if __name__ == "__main__":
    answer(run)
