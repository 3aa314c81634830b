"""What the scheduler plans and whom it makes wait, with no device."""

from __future__ import annotations

import pytest

from qwen3_dist.engine.request_queue import MAX_PRIORITY_STEPS, priority_steps
from qwen3_dist.engine.scheduler import Scheduler
from qwen3_dist.engine.sequence import Sequence
from qwen3_dist.protocol.step_plan import LAST_SAMPLED, StepPlan, StepResult
from tests.scheduling import EOS, make_scheduler, make_sequence


def answer(plan: StepPlan, token_id: int = 7) -> StepResult:
    sampled = [step for step in plan.sequences if step.sample is not None]
    return StepResult(plan.step, (token_id,) * len(sampled), (None,) * len(sampled))


def run(scheduler: Scheduler, token_id: int = 7) -> list[StepPlan]:
    plans = []
    while (plan := scheduler.schedule()) is not None:
        plans.append(plan)
        scheduler.update(plan, answer(plan, token_id))
    return plans


def planned(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    assert plan is not None
    return plan


def shape(plan: StepPlan) -> list[tuple[int, int, int, bool]]:
    """(sequence, first position, tokens, sampled) of each part."""
    return [(s.seq_id, s.start, len(s.token_ids), s.sample is not None) for s in plan.sequences]


def test_a_long_prompt_is_prefilled_in_chunks_of_the_budget_and_then_decoded() -> None:
    scheduler = make_scheduler(tokens=16)
    scheduler.add(make_sequence(1, 37, max_tokens=2))
    assert [shape(plan) for plan in run(scheduler)] == [
        [(1, 0, 16, False)],
        [(1, 16, 16, False)],
        [(1, 32, 5, True)],
        [(1, 37, 1, True)],
    ]


def test_what_another_engine_began_runs_before_what_waits() -> None:
    scheduler = make_scheduler(seqs=1)
    scheduler.add(make_sequence(1, 3, max_tokens=5))
    planned(scheduler)
    scheduler.add(make_sequence(2, 3))
    begun = make_sequence(3, 3)
    begun.resume([7, 7], frozenset({EOS}))
    scheduler.add(begun)
    assert [sequence.seq_id for sequence in scheduler.waiting] == [3, 2]


def test_decodes_take_their_tokens_before_an_earlier_prompts_chunk() -> None:
    scheduler = make_scheduler(tokens=16)
    scheduler.add(make_sequence(1, 20))
    scheduler.add(make_sequence(2, 3))
    assert shape(planned(scheduler)) == [(1, 0, 16, False)]
    plan = planned(scheduler)
    assert shape(plan) == [(1, 16, 4, True), (2, 0, 3, True)]
    scheduler.update(plan, answer(plan))
    scheduler.add(make_sequence(3, 40, priority=-1))
    assert shape(planned(scheduler)) == [(1, 20, 1, True), (2, 3, 1, True), (3, 0, 14, False)]


def test_micro_batches_of_a_pipeline_share_the_decodes_between_them() -> None:
    scheduler = make_scheduler(stages=2)
    for seq_id in range(5):
        scheduler.add(make_sequence(seq_id, 1))
    first = planned(scheduler)
    scheduler.update(first, answer(first))
    steps = [planned(scheduler), planned(scheduler)]
    assert [[part.seq_id for part in step.sequences] for step in steps] == [[0, 1, 2], [3, 4]]
    assert scheduler.schedule() is None  # each sequence waits for its token
    scheduler.update(steps[0], answer(steps[0]))
    assert [part.seq_id for part in planned(scheduler).sequences] == [0, 1, 2]


def test_chunks_of_one_prompt_follow_each_other_into_a_pipeline() -> None:
    scheduler = make_scheduler(stages=2, tokens=16)
    scheduler.add(make_sequence(1, 37))
    assert [shape(planned(scheduler)) for _ in range(3)] == [
        [(1, 0, 16, False)],
        [(1, 16, 16, False)],
        [(1, 32, 5, True)],
    ]


def test_a_new_sequence_finds_less_ahead_where_its_prefix_is_cached() -> None:
    cold, warm = make_scheduler(), make_scheduler()
    for scheduler in (cold, warm):
        scheduler.add(make_sequence(1, 5))
    warm.add(make_sequence(2, range(9), max_tokens=1))
    run_one = planned(warm)
    warm.update(run_one, answer(run_one))
    new = make_sequence(3, range(12))
    assert cold.tokens_ahead(new) == 5
    assert warm.tokens_ahead(new) == 6 - 8  # the other one's prompt and first token, less two blocks


def test_no_more_sequences_run_than_the_limit() -> None:
    scheduler = make_scheduler(seqs=2)
    for seq_id in range(5):
        scheduler.add(make_sequence(seq_id, 1))
    assert max(len(plan.sequences) for plan in run(scheduler)) == 2
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks


def test_the_last_in_line_is_preempted_and_computed_again_with_its_output() -> None:
    scheduler = make_scheduler(blocks=4, caching=False)
    first, second = make_sequence(1, 7, max_tokens=8), make_sequence(2, 7, max_tokens=8)
    scheduler.add(first)
    scheduler.add(second)
    plans = run(scheduler)
    assert scheduler.counts.preemptions == 1
    again = [shape(plan) for plan in plans if (2, 0) in [(s.seq_id, s.start) for s in plan.sequences]]
    assert again == [[(1, 0, 7, True), (2, 0, 7, True)], [(2, 0, 9, True)]]
    assert first.num_output == second.num_output == 8
    assert first.finish_reason == second.finish_reason == "length"


def test_a_prompt_is_admitted_only_when_all_of_it_finds_room() -> None:
    scheduler = make_scheduler(blocks=8, tokens=8)
    scheduler.add(make_sequence(1, 12, max_tokens=2))
    scheduler.add(make_sequence(2, 24, max_tokens=2))
    plans = run(scheduler)
    assert scheduler.counts.preemptions == 0
    assert [shape(plan)[0][0] for plan in plans] == [1, 1, 1, 2, 2, 2, 2]


def test_a_lower_priority_value_goes_first_and_a_preempted_sequence_keeps_its_place() -> None:
    scheduler = make_scheduler(seqs=1)
    for seq_id, priority in enumerate((0, 5, -2, 0)):
        scheduler.add(make_sequence(seq_id, 3, max_tokens=1, priority=priority))
    assert [plan.sequences[0].seq_id for plan in run(scheduler)] == [2, 0, 3, 1]


@pytest.mark.parametrize(
    ("priority", "others", "waits"),
    [(2, 0, 410), (0, -1, 256), (0, -(2**31), 1024), (100, 0, 995), (2**31 - 1, -(2**31), 2048)],
)
def test_no_priority_waits_for_ever(priority: int, others: int, waits: int) -> None:
    scheduler = make_scheduler(seqs=1)
    scheduler.add(make_sequence(0, 3, max_tokens=1, priority=priority))
    for seq_id in range(1, 4 * MAX_PRIORITY_STEPS):
        scheduler.add(make_sequence(seq_id, 3, max_tokens=1, priority=others))
        plan = planned(scheduler)
        scheduler.update(plan, answer(plan))
        if plan.sequences[0].seq_id == 0:
            break
    assert seq_id == waits + 1


def test_each_priority_goes_before_the_next_higher_one() -> None:
    in_order = [-(2**31), -1000, -100, -11, -10, -2, -1, 0, 1, 2, 10, 11, 100, 1000, 2**31 - 1]
    assert [priority_steps(priority) for priority in in_order] == sorted(
        {priority_steps(p) for p in in_order}
    )


def choices(request: str, seq_ids: range, max_tokens: int = 50) -> list[Sequence]:
    made = [make_sequence(seq_id, 3, max_tokens) for seq_id in seq_ids]
    for sequence in made:
        sequence.request_id = request
    return made


def test_requests_of_several_choices_give_slots_to_those_that_have_none() -> None:
    scheduler = make_scheduler(seqs=4)
    for sequence in (*choices("a", range(4)), *choices("b", range(10, 14))):
        scheduler.add(sequence)
    scheduler.update(plan := planned(scheduler), answer(plan))
    assert {"a", "b"} == {sequence.request_id for sequence in scheduler.running}
    for seq_id in (20, 21):
        scheduler.add(make_sequence(seq_id, 3, max_tokens=2))
    for _ in range(4):
        scheduler.update(plan := planned(scheduler), answer(plan))
    assert all(sequence.seq_id < 20 for sequence in (*scheduler.running, *scheduler.waiting))
    run(scheduler)  # and whoever gave a slot is answered in full
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks


def test_a_request_keeps_its_slots_where_nobody_waits_with_none() -> None:
    scheduler = make_scheduler(seqs=4)
    for sequence in choices("a", range(8)):
        scheduler.add(sequence)
    run(scheduler)
    assert scheduler.counts.preemptions == 0


def test_requests_of_one_choice_are_never_preempted_for_their_slots() -> None:
    scheduler = make_scheduler(seqs=2)
    for seq_id in range(8):
        scheduler.add(make_sequence(seq_id, 3, max_tokens=5))
    run(scheduler)
    assert scheduler.counts.preemptions == 0


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
    plan = planned(scheduler)
    scheduler.finish(sequence, "abort")
    assert scheduler.update(plan, answer(plan)) == []
    assert (sequence.finish_reason, sequence.num_output) == ("abort", 0)
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks


def test_a_step_is_planned_before_the_one_before_it_has_answered() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(1, 5, max_tokens=3))
    first, second = planned(scheduler), planned(scheduler)
    assert shape(second) == [(1, 5, 1, True)] and second.sequences[0].token_ids == (LAST_SAMPLED,)
    scheduler.update(first, answer(first))
    third = planned(scheduler)
    scheduler.update(second, answer(second))
    assert scheduler.schedule() is None, "the third token is the last and on its way"
    assert scheduler.update(third, answer(third))[0].sequence.finish_reason == "length"


def test_a_step_planned_past_the_end_of_a_sequence_gives_it_nothing() -> None:
    scheduler, sequence = make_scheduler(), make_sequence(1, 5)
    scheduler.add(sequence)
    first, second = planned(scheduler), planned(scheduler)
    (advance,) = scheduler.update(first, answer(first, EOS))
    assert (advance.sequence, advance.token_ids) == (sequence, (EOS,))
    assert scheduler.update(second, answer(second)) == []
    assert sequence.num_output == 1 and not scheduler.has_work


def test_a_prompt_seen_before_is_computed_from_its_first_new_block() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(1, range(10, 20), max_tokens=1))
    run(scheduler)
    scheduler.add(make_sequence(2, [*range(10, 18), 50, 51], max_tokens=1))
    scheduler.add(make_sequence(3, [9, *range(11, 20)], max_tokens=1))
    assert shape(planned(scheduler)) == [(2, 8, 2, True), (3, 0, 10, True)]
    assert (scheduler.counts.prompt_tokens, scheduler.counts.cached_prompt_tokens) == (30, 8)


def test_a_prompt_wholly_cached_still_computes_its_last_token() -> None:
    scheduler = make_scheduler()
    for seq_id in (1, 2):
        scheduler.add(make_sequence(seq_id, range(8), max_tokens=1))
        plans = run(scheduler)
    assert shape(plans[0]) == [(2, 4, 4, True)]


def test_choices_of_one_prompt_share_its_blocks_in_their_first_step() -> None:
    scheduler = make_scheduler(blocks=6, tokens=64)
    for seq_id in range(3):
        scheduler.add(make_sequence(seq_id, range(14), max_tokens=2))
    plan = planned(scheduler)
    assert shape(plan) == [(0, 0, 14, True), (1, 12, 2, True), (2, 12, 2, True)]
    assert len({part.new_blocks[:3] for part in plan.sequences}) == 1
    scheduler.blocks.check_integrity(scheduler.running)


def test_an_output_is_found_by_the_prompt_that_continues_it() -> None:
    scheduler = make_scheduler(tokens=64)
    scheduler.add(make_sequence(1, range(30, 36), max_tokens=7))
    run(scheduler, token_id=7)
    scheduler.add(make_sequence(2, [*range(30, 36), *[7] * 7, 8], max_tokens=1))
    assert shape(planned(scheduler)) == [(2, 12, 2, True)]


def test_the_least_recently_held_prefix_is_evicted_and_its_beginning_last() -> None:
    scheduler = make_scheduler(blocks=8, tokens=64)
    for seq_id, first in enumerate((10, 30)):
        scheduler.add(make_sequence(seq_id, range(first, first + 16), max_tokens=1))
        run(scheduler)
    scheduler.add(make_sequence(2, range(50, 58), max_tokens=1))  # takes two blocks
    run(scheduler)
    starts = []
    for seq_id, first in ((3, 30), (4, 10)):
        scheduler.add(make_sequence(seq_id, range(first, first + 16), max_tokens=1))
        starts.append(shape(run(scheduler)[0])[0][1])
    assert starts == [12, 4], "three blocks of the first prefix were taken, from its end"


def test_without_prefix_caching_nothing_is_shared() -> None:
    scheduler = make_scheduler(caching=False)
    for seq_id in (1, 2):
        scheduler.add(make_sequence(seq_id, range(8), max_tokens=1))
        assert shape(run(scheduler)[0]) == [(seq_id, 0, 8, True)]
    assert scheduler.blocks.num_cached == 0


def test_integrity_names_a_block_that_is_shared_wrongly() -> None:
    scheduler = make_scheduler()
    first, second = make_sequence(1, 6), make_sequence(2, 6)
    scheduler.add(first)
    scheduler.add(second)
    planned(scheduler)
    second.block_table[0] = first.block_table[0]
    with pytest.raises(AssertionError, match="leaked or shared wrongly"):
        scheduler.blocks.check_integrity([first, second])


def test_suspects_begin_one_after_the_other_and_are_none_once_they_have_a_token() -> None:
    """So that the loss of an engine is the doing of one of them at most."""
    scheduler = make_scheduler(tokens=16)
    for seq_id, suspect in enumerate(
        ("a", "b", "b", "c", "")
    ):  # `b` has two prompts; the last was never lost
        scheduler.add(sequence := make_sequence(seq_id, 3, max_tokens=3))
        sequence.request_id, sequence.suspect = f"{suspect}-{seq_id}", suspect
    seen: list[list[int]] = []
    plans: list[StepPlan] = []
    for _ in range(4):
        for _ in range(2 - len(plans)):  # two steps in flight
            plans.append(planned(scheduler))
            seen.append([part.seq_id for part in plans[-1].sequences])
        plan = plans.pop(0)
        scheduler.update(plan, answer(plan))
    assert seen == [[0, 4], [0, 4], [0, 4, 1, 2], [1, 2], [1, 2, 3]]


def test_other_prompts_of_a_suspect_still_are_when_one_has_a_token() -> None:
    scheduler = make_scheduler(tokens=4)
    for seq_id, suspect in enumerate(("a", "a", "b")):
        scheduler.add(sequence := make_sequence(seq_id, 3, max_tokens=9))
        sequence.request_id, sequence.suspect = f"{suspect}-{seq_id}", suspect
    for expected in ([0, 1], [0, 1], [0, 1, 2]):  # of the second prompt one token fits into the first step
        plan = planned(scheduler)
        assert sorted(part.seq_id for part in plan.sequences) == expected
        scheduler.update(plan, answer(plan))
