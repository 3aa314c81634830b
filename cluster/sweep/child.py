"""The process in which a sweep runs one layout: reads its job from stdin, prints its result as JSON on stdout."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

from cluster.planning.burst_point import BurstPoint
from cluster.sweep.run import SweepWorkload
from qwen3_dist.benchmark import Workload, measure, warm_up
from qwen3_dist.engine.engine import Engine
from qwen3_dist.errors import QwenDistError
from qwen3_dist.layout import Layout

_KEPT = ("output_tokens_per_s", "total_tokens_per_s", "ttft_ms", "itl_ms", "steps", "preemptions")


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The figures of each point's fastest repeat, or `error` if the engine does not start."""
    values = job["workload"]
    points = tuple(BurstPoint(**point) for point in values.pop("points"))
    workload = SweepWorkload(points, **values)
    layout = Layout.parse(job["layout"])
    try:
        engine = Engine(workload.engine_config(job["model"], job["random_weights"], layout))
    except QwenDistError as error:
        return {"error": str(error)}
    try:
        warm_up(engine)
        found = [_measured(engine, point, workload.repeats) for point in points]
    finally:
        engine.shutdown()
    about = {name: [each.pop(name) for each in found][-1] for name in ("hardware", "versions")}
    return {"points": found, "backends": engine.backends, **about}


def _measured(engine: Engine, point: BurstPoint, repeats: int) -> dict[str, Any]:
    runs = [
        measure(engine, Workload(point.num_prompts, point.input_len, point.output_len, seed=repeat))
        for repeat in range(repeats)
    ]
    best = max(runs, key=lambda figures: figures["output_tokens_per_s"])
    kept = {name: best[name] for name in (*_KEPT, "hardware", "versions")}
    return {"point": str(point), **kept}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        answer = run(json.loads(sys.stdin.read()))
    print(json.dumps(answer))
