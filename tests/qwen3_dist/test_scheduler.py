"""The scheduler and its blocks through whole histories, with no device: a fake rank answers its plans."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_dist.engine.block_manager import BlockManager
from qwen3_dist.engine.plan import StepPlan, StepResult
from qwen3_dist.engine.scheduler import Scheduler, SchedulerLimits
from qwen3_dist.engine.sequence import Sequence
from qwen3_dist.sampling_params import SamplingParams

EOS = 0


def make_scheduler(blocks: int = 64, block_size: int = 4, seqs: int = 8, tokens: int = 16) -> Scheduler:
    return Scheduler(BlockManager(blocks, block_size), SchedulerLimits(seqs, tokens), frozenset({EOS}))


def make_sequence(seq_id: int, prompt_len: int, max_tokens: int = 4, **params: object) -> Sequence:
    prompt = [100 + seq_id] * prompt_len
    return Sequence(seq_id, str(seq_id), 0, prompt, SamplingParams(**params), 0, max_tokens)  # type: ignore[arg-type]


def answer(plan: StepPlan, token_id: int = 7) -> StepResult:
    sampled = [step for step in plan.sequences if step.sample is not None]
    return StepResult(plan.step, (token_id,) * len(sampled), (None,) * len(sampled))


def run(scheduler: Scheduler, token_id: int = 7) -> list[StepPlan]:
    plans = []
    while (plan := scheduler.schedule()) is not None:
        plans.append(plan)
        scheduler.update(plan, answer(plan, token_id))
    return plans


def shape(plan: StepPlan) -> list[tuple[int, int, int, bool]]:
    """(sequence, first position, tokens, sampled) of each part."""
    return [(s.seq_id, s.start, len(s.token_ids), s.sample is not None) for s in plan.sequences]


def test_a_long_prompt_is_prefilled_in_chunks_of_the_budget_and_then_decoded() -> None:
    scheduler = make_scheduler(tokens=16)
    scheduler.add(make_sequence(1, prompt_len=37, max_tokens=2))
    assert [shape(plan) for plan in run(scheduler)] == [
        [(1, 0, 16, False)],
        [(1, 16, 16, False)],
        [(1, 32, 5, True)],
        [(1, 37, 1, True)],
    ]


def test_decodes_go_beside_a_prefill_chunk_and_come_first() -> None:
    scheduler = make_scheduler(tokens=16)
    scheduler.add(make_sequence(1, prompt_len=3))
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.update(plan, answer(plan))
    scheduler.add(make_sequence(2, prompt_len=40))
    plan = scheduler.schedule()
    assert plan is not None and shape(plan) == [(1, 3, 1, True), (2, 0, 15, False)]


def test_no_more_sequences_run_than_the_limit() -> None:
    scheduler = make_scheduler(seqs=2)
    for seq_id in range(5):
        scheduler.add(make_sequence(seq_id, prompt_len=1))
    assert max(len(plan.sequences) for plan in run(scheduler)) == 2
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks


def test_the_latest_arrival_is_preempted_and_computed_again_with_its_output() -> None:
    scheduler = make_scheduler(blocks=4, block_size=4)
    first, second = make_sequence(1, 7, max_tokens=8), make_sequence(2, 7, max_tokens=8)
    scheduler.add(first)
    scheduler.add(second)
    plans = run(scheduler)
    assert scheduler.num_preemptions == 1
    again = [shape(plan) for plan in plans if (2, 0) in [(s.seq_id, s.start) for s in plan.sequences]]
    assert again == [[(1, 0, 7, True), (2, 0, 7, True)], [(2, 0, 9, True)]]
    assert first.num_output == second.num_output == 8
    assert first.finish_reason == second.finish_reason == "length"


def test_eos_and_stop_tokens_end_a_sequence_unless_eos_is_ignored() -> None:
    for params, token, reason, outputs in [
        ({}, EOS, "stop", 1),
        ({"ignore_eos": True}, EOS, "length", 4),
        ({"stop_token_ids": (9,)}, 9, "stop", 1),
        ({"stop_token_ids": (9,), "ignore_eos": True}, 9, "stop", 1),
    ]:
        scheduler, sequence = make_scheduler(), make_sequence(1, 5, **params)
        scheduler.add(sequence)
        run(scheduler, token)
        assert (sequence.finish_reason, sequence.num_output) == (reason, outputs)


def test_a_sequence_aborted_while_its_step_runs_is_left_alone_by_the_result() -> None:
    scheduler, sequence = make_scheduler(), make_sequence(1, 5)
    scheduler.add(sequence)
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.finish(sequence, "abort")
    assert scheduler.update(plan, answer(plan)) == []
    assert (sequence.finish_reason, sequence.num_output) == ("abort", 0)
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 20), st.integers(1, 10)),
        st.tuples(st.just("step"), st.integers(0, 3), st.just(0)),
        st.tuples(st.just("abort"), st.integers(0, 30), st.just(0)),
    ),
    max_size=80,
)


@settings(max_examples=300, deadline=None)
@given(actions=ACTIONS, blocks=st.integers(9, 20), tokens=st.integers(1, 24), seqs=st.integers(1, 6))
def test_no_history_of_adds_steps_and_aborts_leaks_or_shares_a_block(
    actions: list[tuple[str, int, int]], blocks: int, tokens: int, seqs: int
) -> None:
    scheduler = make_scheduler(blocks, 4, seqs, tokens)
    added: list[Sequence] = []
    for action, first, second in actions:
        if action == "add":
            added.append(make_sequence(len(added), first, max_tokens=second))
            scheduler.add(added[-1])
        elif action == "abort" and first < len(added) and added[first].finish_reason is None:
            scheduler.finish(added[first], "abort")
        elif action == "step" and (plan := scheduler.schedule()) is not None:
            assert plan.num_tokens <= tokens and len(plan.sequences) <= seqs
            for step in plan.sequences:
                assert (step.start + len(step.token_ids)) <= 4 * len(step.block_table)
            scheduler.update(plan, answer(plan, first))  # token 0 is EOS
        scheduler.blocks.check_integrity([*scheduler.running, *scheduler.waiting])
    run(scheduler)
    assert scheduler.blocks.num_free == blocks
    assert all(sequence.finish_reason is not None for sequence in added)
    for sequence in added:
        assert sequence.finish_reason != "length" or sequence.num_output == sequence.max_tokens
