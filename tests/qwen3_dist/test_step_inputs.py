"""What plans carry, and what ranks make of it with what they keep."""

from __future__ import annotations

import pickle
from array import array

import pytest
import torch

from qwen3_dist.pooling_params import PoolingParams
from qwen3_dist.protocol.plan_columns import SequenceColumns
from qwen3_dist.protocol.step_plan import LAST_SAMPLED, PromptLogprobsSpec, SampleSpec, SequenceStep, StepPlan
from qwen3_dist.worker.inputs import StepInputs
from tests.scheduling import make_scheduler, make_sequence
from tests.setups import setup

CPU = torch.device("cpu")
DRAW = SampleSpec(0.7, 0.9, 20, 2**63 - 1, 9, None)


def plan_of(*sequences: SequenceStep) -> StepPlan:
    return StepPlan.for_groups(1, [sequences])[0]


def test_a_plan_travels_whole() -> None:
    few = [
        plan_of(),
        plan_of(SequenceStep(2**40, 0, (LAST_SAMPLED,), 9, (), DRAW, 1)),
        plan_of(
            SequenceStep(1, 3, (LAST_SAMPLED,), 9, (), DRAW._replace(logprobs=0), 2, adapter=2),
            SequenceStep(2, 1, (4,), 9, (7,), DRAW, 2, setup=setup(presence_penalty=1.0)),
            SequenceStep(3, 2, (5, 6, 7), 9, (), DRAW._replace(logprobs=5), 3, num_drafted=2),
            SequenceStep(4, 0, (1, 2, 3, 4), 0, (5, 9, 8), None, prompt_request=PoolingParams()),
            SequenceStep(
                5, 4, (1, 2, 3, 4), 4, (6,), None, 1, prompt_request=PromptLogprobsSpec(1, (3, 4), 2)
            ),
        ),
    ]
    many = [plan_of(*plan.sequences * 10) for plan in few]
    for plan in few + many:
        assert pickle.loads(pickle.dumps(plan)) == plan
        assert pickle.loads(pickle.dumps(plan._replace(exact=True))).exact


@pytest.mark.parametrize("sequences", [4, 20], ids=lambda count: f"{count}_sequences")
def test_a_step_costs_no_more_bytes_for_more_context(sequences: int) -> None:
    def decodes(context: int) -> bytes:
        room = sequences * context
        scheduler = make_scheduler(blocks=room, block_size=16, seqs=sequences, tokens=room)
        for number in range(sequences):
            scheduler.add(make_sequence(number, [number] * context, max_tokens=50))
        assert scheduler.schedule() is not None  # the prompts
        plan = scheduler.schedule()
        assert plan is not None and plan.decodes_only
        return pickle.dumps(plan)

    wider = 4 * sequences  # a position takes more bytes
    assert len(decodes(4096)) <= len(decodes(64)) + wider


def test_ranks_find_the_blocks_that_earlier_plans_named() -> None:
    inputs = StepInputs(max_num_seqs=2, max_blocks=4, block_size=4, device=CPU, spare_block=99)
    inputs.batch(plan_of(SequenceStep(0, 1, (1, 2, 3, 4, 5, 6), 0, (7, 5), None)))
    inputs.last_sampled[1] = 42
    batch = inputs.batch(plan_of(SequenceStep(0, 1, (LAST_SAMPLED,), 7, (), DRAW, 2)))
    assert (batch.token_ids.tolist(), batch.positions.tolist(), batch.slots.tolist()) == (
        [42],
        [7],
        [5 * 4 + 3],
    )
    batch = inputs.batch(plan_of(SequenceStep(0, 1, (8, 9), 8, (3,), DRAW, 2, num_drafted=1)))
    assert batch.slots.tolist() == [12, 13]
    assert batch.block_tables[batch.table_rows, :3].tolist() == [[7, 5, 3]]
    single = inputs.batch(plan_of(SequenceStep(0, 1, (8, 9), 8, (3,), DRAW, 2, num_drafted=1)), True)
    assert single.block_tables[single.table_rows, :3].tolist() == [[7, 5, 3]] * 2
    assert inputs.tables[2].tolist() == [99] * 4  # what padding writes to
    batch = inputs.batch(plan_of(SequenceStep(1, 1, (1, 2), 0, (6,), DRAW)))  # another sequence in the slot
    assert batch.slots.tolist() == [24, 25]


def test_a_repeated_step_finds_its_blocks_although_another_sequence_has_its_slot() -> None:
    inputs = StepInputs(max_num_seqs=1, max_blocks=4, block_size=4, device=CPU)
    inputs.batch(plan_of(SequenceStep(0, 0, (1,) * 6, 0, (7, 5), None)))
    inputs.batch(plan_of(SequenceStep(1, 0, (1,), 0, (2,), DRAW)))
    batch = inputs.batch(plan_of(SequenceStep(0, 0, (3,), 6, (7, 5), DRAW)))
    assert batch.slots.tolist() == [5 * 4 + 2]


def test_columns_hold_what_fits_them() -> None:
    """Token ids, positions and blocks are 32 bits wide, ids of sequences and seeds 64."""
    sequence = SequenceStep(2**62, 0, (2**31 - 1,), 2**31 - 1, (2**31 - 1,), DRAW, 2**27)
    assert SequenceColumns.of([sequence]).sequences() == (sequence,)
    assert array("i").itemsize == 4 and array("q").itemsize == 8
