"""Steps of real ranks, decodes padded to a captured size, as a CUDA graph would run them, against a rank alone.

Without a GPU `DecodeGraphs.run` runs the padded step itself.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from qwen3_dist.config import ModelConfig
from qwen3_dist.model import feed_forward
from qwen3_dist.ops.batch import StepBatch
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.parallel.dispatch import DispatchOptions
from qwen3_dist.protocol.step_plan import SampleSpec, SequenceStep, StepPlan, StepResult
from qwen3_dist.settings import EngineConfig
from qwen3_dist.weights.loader import load_model
from qwen3_dist.weights.source import bundled_path
from qwen3_dist.worker import runner
from qwen3_dist.worker.decode_graphs import DecodeGraphs
from qwen3_dist.worker.runner import ModelRunner
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def part(slot: int, tokens: tuple[int, ...], start: int) -> SequenceStep:
    spec = SampleSpec(0.0, 1.0, 0, 0, start + len(tokens), 3)
    return SequenceStep(slot, slot, tokens, start, (2 * slot, 2 * slot + 1), spec)


# Of two dp groups each: prompts, decodes, decodes of one group alone, a prompt beside decodes, decodes.
STEPS = [
    ((part(0, tuple(range(3, 12)), 0), part(1, (5, 7, 9), 0)), (part(0, (8, 8, 8, 8, 8, 8), 0),)),
    ((part(0, (7,), 9), part(1, (4,), 3)), (part(0, (9,), 6),)),
    ((part(0, (6,), 10), part(1, (3,), 4)), ()),
    ((part(0, (5,), 11), part(2, (7, 8), 0)), (part(0, (2,), 7),)),
    ((part(0, (9,), 12), part(1, (8,), 5), part(2, (3,), 2)), (part(0, (2,), 8),)),
]
DECODES = 3  # of those steps


def make_runner(parallel: ParallelContext, **settings: str) -> ModelRunner:
    path = bundled_path()
    model = load_model(path, ModelConfig.from_directory(path), parallel, torch.float32, CPU)
    config = EngineConfig(model=str(path), max_model_len=64, max_num_seqs=4, **settings)  # type: ignore[arg-type]
    return ModelRunner(model, 32, config, path=path)


def alone(group: int) -> list[StepResult | None]:
    single = make_runner(ParallelContext.single())
    return [
        single.run(StepPlan.for_groups(number, [parts[group]])[0]) if parts[group] else None
        for number, parts in enumerate(STEPS)
    ]


def assert_same(got: StepResult | None, expected: StepResult | None) -> None:
    assert got is not None and expected is not None
    assert got.token_ids == expected.token_ids
    for mine, theirs in zip(got.logprobs, expected.logprobs, strict=True):
        assert mine is not None and theirs is not None
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3)


def check_steps(parallel: ParallelContext, way: str, by_capacity: bool) -> None:
    parallel = replace(parallel, dispatch=DispatchOptions(by_capacity=by_capacity))
    at, layout = parallel.coords, parallel.layout
    answers = parallel.pipeline.is_last and at.tp_rank == 0
    expected = alone(at.group) if answers else []
    padded: list[int] = []
    run = DecodeGraphs.run

    def counted(graphs: DecodeGraphs, batch: StepBatch) -> torch.Tensor | None:
        assert graphs.uses_all_to_all(batch) is (way == "all_to_all")
        padded.append(batch.largest_group)
        return run(graphs, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "can_capture", lambda _: True)
        patch.setattr(DecodeGraphs, "run", counted)
        mine = make_runner(parallel, moe_dispatch=way)
        for number, parts in enumerate(STEPS):
            plan = StepPlan.for_groups(number, parts[: layout.dp])[at.group]
            got = mine.run(plan)
            if answers and plan.sequences:
                assert_same(got, expected[number])
            else:
                assert got is None
    assert len(padded) == DECODES
    dist.barrier()  # no rank ends while the next stage still receives


def check_all_gather(parallel: ParallelContext) -> None:
    check_steps(parallel, "all_gather", by_capacity=False)


def check_counts(parallel: ParallelContext) -> None:
    check_steps(parallel, "all_to_all", by_capacity=False)


def check_capacity(parallel: ParallelContext) -> None:
    check_steps(parallel, "all_to_all", by_capacity=True)


@pytest.mark.parametrize("layout", ["pp=2", "dp=2,ep=2", "tp=2,ep=2", "tp=2,dp=2,ep=2", "pp=2,dp=2,ep=2"])
def test_padded_decodes_of_ranks_are_those_of_one_rank(layout: str) -> None:
    run_ranks(check_all_gather, layout)
    if "ep" in layout:
        run_ranks(check_counts, layout)
        run_ranks(check_capacity, layout)


def check_overflow(parallel: ParallelContext) -> None:
    """Too little room for a step's rows: it is void everywhere, and right when it is run again."""
    parallel = replace(parallel, dispatch=DispatchOptions(by_capacity=True))
    at = parallel.coords
    expected = alone(at.group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "can_capture", lambda _: True)
        patch.setattr(feed_forward, "capacity", lambda layout, config, rows: 1)
        mine = make_runner(parallel, moe_dispatch="all_to_all")
        for number, parts in enumerate(STEPS):
            plan = StepPlan.for_groups(number, parts[: parallel.layout.dp])[at.group]
            got = mine.run(plan)
            if got is not None and not got.overflowed:
                assert number, "the prompts do not fit"
                assert_same(got, expected[number])
            got = mine.run(plan._replace(exact=True))
            if plan.sequences and at.tp_rank == 0:
                assert got is not None and not got.overflowed
                assert_same(got, expected[number])


@pytest.mark.parametrize("layout", ["dp=2,ep=2", "tp=2,dp=2,ep=4", "tp=4,ep=2"])
def test_a_step_that_overflows_is_void_in_all_groups_and_exact_when_run_again(layout: str) -> None:
    run_ranks(check_overflow, layout)
