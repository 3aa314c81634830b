"""Host time of a step outside the model: sending the plan to a rank, and building the batch there.

    python -m benchmarks.step_host [--json] [--keep]

Decode plans of a real scheduler; batches are built on the CPU. Each row has medians: `plan_us` for pickling the plan
and unpickling it on a rank, `build_us` for building the batch, `plan_bytes` for its size. With `tp=2` two processes
unpickle and build at the same time, and the row has the slower one.
"""

from __future__ import annotations

import argparse
import json
import pickle
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from benchmarks.record import keep
from qwen3_dist.engine.block_manager import BlockManager
from qwen3_dist.engine.scheduler import Scheduler
from qwen3_dist.engine.sequence import Sequence
from qwen3_dist.protocol.step_limits import SchedulerLimits
from qwen3_dist.protocol.step_plan import StepPlan, StepResult
from qwen3_dist.sampling_params import SamplingParams
from qwen3_dist.worker.inputs import StepInputs

_BLOCK_SIZE = 16
_STEPS = 60
_LAYOUTS = {"tp=1": 1, "tp=2": 2}
_SEQUENCES = (1, 64, 256)
_CONTEXTS = (100, 8192, 32768)


def decoding_plans(sequences: int, context: int) -> list[StepPlan]:
    """The plans that prefill `sequences` prompts of `context` tokens, then those of `_STEPS` decode steps."""
    blocks = sequences * (context // _BLOCK_SIZE + _STEPS)
    limits = SchedulerLimits(sequences, sequences * context)
    scheduler = Scheduler(BlockManager(blocks, _BLOCK_SIZE, prefix_caching=False), limits, frozenset())
    params = SamplingParams(temperature=0.6, top_p=0.95, top_k=20)
    for number in range(sequences):
        length = context + number % _BLOCK_SIZE  # so that each step needs new blocks
        scheduler.add(Sequence(number, str(number), 0, [7] * length, params, number, max_tokens=10**6))
    plans: list[StepPlan] = []
    while len(plans) == 0 or not plans[-1].decodes_only or len(plans) <= _STEPS:
        plan = scheduler.schedule()
        assert plan is not None
        plans.append(plan)
        sampled = sum(step.sample is not None for step in plan.sequences)
        scheduler.update(plan, StepResult(plan.step, (7,) * sampled, (None,) * sampled))
    return plans


def rank_seconds(packed: list[bytes], sequences: int, context: int) -> tuple[list[float], list[float]]:
    """Seconds that a rank takes to unpickle each plan, and to build its batch."""
    torch.set_num_threads(1)
    width = -(-(context + _BLOCK_SIZE + _STEPS) // _BLOCK_SIZE) + 1
    inputs = StepInputs(sequences, width, _BLOCK_SIZE, torch.device("cpu"))
    unpickling, building = [], []
    for data in packed:
        began = time.perf_counter()
        plan = pickle.loads(data)
        loaded = time.perf_counter()
        inputs.batch(plan)
        unpickling.append(loaded - began)
        building.append(time.perf_counter() - loaded)
    return unpickling, building


def measure(layout: str, sequences: int, context: int, ranks: Iterable[Any]) -> dict[str, Any]:
    """One row: medians over the decode steps, of the slower rank."""
    plans = decoding_plans(sequences, context)
    pickling, packed = [], []
    for plan in plans:
        began = time.perf_counter()
        packed.append(pickle.dumps(plan, protocol=pickle.HIGHEST_PROTOCOL))
        pickling.append(time.perf_counter() - began)
    answers = [rank.submit(rank_seconds, packed, sequences, context) for rank in ranks]
    unpickling, building = zip(*(answer.result() for answer in answers), strict=True)
    return {
        "layout": layout,
        "sequences": sequences,
        "context": context,
        "plan_us": _microseconds(pickling) + max(map(_microseconds, unpickling)),
        "build_us": max(map(_microseconds, building)),
        "plan_bytes": int(statistics.median(map(len, packed[-_STEPS:]))),
    }


def _microseconds(seconds: list[float]) -> int:
    return round(1e6 * statistics.median(seconds[-_STEPS:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print only one JSON object per row")
    parser.add_argument("--keep", action="store_true", help="write the rows to benchmarks/results/")
    options = parser.parse_args()
    rows = []
    pools = [ProcessPoolExecutor(max_workers=1) for _ in range(max(_LAYOUTS.values()))]
    for layout, world in _LAYOUTS.items():
        for sequences in _SEQUENCES:
            for context in _CONTEXTS:
                rows.append(measure(layout, sequences, context, pools[:world]))
                if options.json or not options.keep:
                    print(json.dumps(rows[-1]), flush=True)
    for pool in pools:
        pool.shutdown()
    if options.keep:
        keep("step-host", rows)


if __name__ == "__main__":
    main()
