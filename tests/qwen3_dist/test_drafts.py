"""Prompt lookup: what is guessed, and what a scheduler does with guesses, with no device."""

from __future__ import annotations

from collections.abc import Sequence as Items

import pytest

from qwen3_dist.engine.block_manager import BlockManager
from qwen3_dist.engine.drafts import Drafter
from qwen3_dist.engine.scheduler import Advance, Scheduler
from qwen3_dist.engine.sequence import Sequence
from qwen3_dist.errors import ConfigError
from qwen3_dist.protocol.outputs import TokenLogprob
from qwen3_dist.protocol.step_limits import SchedulerLimits
from qwen3_dist.protocol.step_plan import StepPlan, StepResult
from qwen3_dist.sampling_params import SamplingParams, StructuredOutputs
from qwen3_dist.speculation import Speculation

EOS = 0


def drafter(k: int = 4, min: int = 1, max: int = 3) -> Drafter:
    return Drafter(Speculation(k, min, max))


def guess(drafter: Drafter, token_ids: list[int], most: int = 99, min_probability: float = 0.0) -> list[int]:
    return drafter.propose(token_ids, most, min_probability)


@pytest.mark.parametrize(
    ("token_ids", "follows"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 1, 2], [3, 4, 5, 6]),
        ([1, 2, 8, 9, 9, 9, 1, 2, 5, 6, 7, 8, 1, 2], [5, 6, 7, 8]),  # the latest place
        ([4, 1, 2, 3, 3, 3, 5, 1, 2, 8, 9, 4, 1, 2], [3, 3, 3, 5]),  # but first the longest end
        ([1, 2, 3], []),
        ([7], []),
        ([5, 6, 5, 6, 5], [6, 5, 6, 5]),  # a text that repeats itself goes on doing so
        ([9, 7, 7], [7, 7, 7, 7]),
    ],
)
def test_what_followed_the_longest_end_last_time_is_guessed(token_ids: list[int], follows: list[int]) -> None:
    assert guess(drafter(), token_ids) == follows
    assert guess(drafter(), token_ids, most=2) == follows[:2]


def test_an_end_shorter_than_the_shortest_is_not_looked_up() -> None:
    assert guess(drafter(min=2), [1, 2, 3, 4, 2]) == []
    assert guess(drafter(min=1), [1, 2, 3, 4, 2]) == [3, 4, 2, 3]


def test_guesses_follow_a_text_that_grows() -> None:
    grown, text = drafter(), [1, 2, 3, 1, 2, 4, 1, 2, 3, 3, 1, 2, 4, 4, 1, 2, 3, 1]
    for length in range(1, len(text) + 1):
        assert guess(grown, text[:length]) == guess(drafter(), text[:length])


def test_more_is_guessed_where_guesses_were_right_and_nothing_where_they_are_not_worth_it() -> None:
    copied, other = drafter(k=8, min=2), drafter(k=8, min=2)
    text = [1, 2, 3, 4, 5, 6, 7, 8]
    assert len(guess(copied, text + [1, 2], min_probability=0.4)) == 1
    assert guess(copied, text + [1, 2], min_probability=0.6) == []
    for length in (4, 6, 8):  # a right one after the other, none of them checked by a step
        guess(copied, text + text[:length], min_probability=1.0)
    assert len(guess(copied, text + text, min_probability=0.4)) > 4
    for ending in ([1, 2], [1, 2, 9, 1, 2], [1, 2, 9, 1, 2, 8, 1, 2]):
        guess(other, text + ending, min_probability=1.0)
    assert guess(other, text + [1, 2, 9, 1, 2, 8, 1, 2], min_probability=0.4) == []


def test_the_text_form_is_read_and_written() -> None:
    assert Speculation.parse("ngram") == Speculation()
    assert Speculation.parse("ngram, k=2,max=5") == Speculation(k=2, max=5)
    assert Speculation.parse(str(Speculation(3, 1, 2))) == Speculation(3, 1, 2)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("eagle", "speculative must be ngram, for example ngram,k=4, not 'eagle'"),
        ("", "speculative must be ngram"),
        ("ngram,k", "has 'k' where k=N, min=N or max=N"),
        ("ngram,k=2,k=3", r"\(each once\) is expected"),
        ("ngram,k=0", "k=0 must lie between 1 and 32"),
        ("ngram,min=3,max=2", "min=3 must lie between 1 and max=2"),
        ("ngram,min=0", "min=0 must lie between 1 and max=4"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Speculation.parse(text)


def make_scheduler(blocks: int = 64, tokens: int = 16, stages: int = 1, free: int = 1000) -> Scheduler:
    limits = SchedulerLimits(8, tokens, stages, Speculation(k=3, min=1), free_tokens=free)
    return Scheduler(BlockManager(blocks, block_size=4), limits, frozenset({EOS}))


def add(
    scheduler: Scheduler, prompt: Items[int], max_tokens: int = 20, seq_id: int = 1, **params: object
) -> Sequence:
    sampling = SamplingParams(**params)  # type: ignore[arg-type]
    sequence = Sequence(seq_id, str(seq_id), 0, list(prompt), sampling, 0, max_tokens)
    scheduler.add(sequence)
    return sequence


def planned(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    assert plan is not None
    return plan


def step(scheduler: Scheduler, *sampled: int) -> tuple[StepPlan, list[Advance]]:
    """Plans a step and answers it with the tokens drawn at its rows."""
    plan = planned(scheduler)
    logprobs = tuple(TokenLogprob(token, -1.0) for token in sampled)
    advanced = scheduler.update(plan, StepResult(plan.step, sampled, logprobs))
    scheduler.blocks.check_integrity(scheduler.running)
    return plan, advanced


def test_right_guesses_and_the_token_after_them_come_in_one_step() -> None:
    scheduler = make_scheduler()
    sequence = add(scheduler, [1, 2, 3, 4, 1, 2])
    plan, (advance,) = step(scheduler, 3, 4, 1, 7)
    (part,) = plan.sequences
    assert part.token_ids == (1, 2, 3, 4, 1, 2, 3, 4, 1) and part.num_drafted == 3
    assert [spec.position for spec in part.sample_specs] == [6, 7, 8, 9]
    assert advance.token_ids == (3, 4, 1, 7)
    assert [logprob.token_id for logprob in advance.logprobs] == [3, 4, 1, 7]
    assert sequence.token_ids == [1, 2, 3, 4, 1, 2, 3, 4, 1, 7] and sequence.num_computed == 9
    assert planned(scheduler).sequences[0].start == 9
    assert (scheduler.counts.drafted_tokens, scheduler.counts.accepted_tokens) == (3, 3)


def test_what_follows_a_wrong_guess_is_thrown_away_and_computed_again() -> None:
    scheduler = make_scheduler()
    sequence = add(scheduler, [1, 2, 3, 4, 1, 2])
    _, (advance,) = step(scheduler, 3, 5, 1, 2)
    assert advance.token_ids == (3, 5) and len(advance.logprobs) == 2
    assert sequence.token_ids[-2:] == [3, 5] and sequence.num_computed == 7
    assert (scheduler.counts.drafted_tokens, scheduler.counts.accepted_tokens) == (3, 1)


def test_a_block_of_guesses_is_found_by_others_only_when_they_were_right() -> None:
    for sampled, cached in [((3, 4, 1, 7), 8), ((5, 4, 1, 7), 4)]:
        scheduler = make_scheduler()
        sequence = add(scheduler, [1, 2, 3, 4, 1, 2])
        plan = planned(scheduler)
        other = Sequence(2, "2", 0, [1, 2, 3, 4, 1, 2, 3, 4, 9], SamplingParams(), 0, 1)
        assert scheduler.blocks.cached_tokens(other) == 4
        scheduler.update(plan, StepResult(plan.step, sampled, ()))
        assert scheduler.blocks.cached_tokens(other) == cached
        scheduler.finish(sequence, "abort")
        assert scheduler.blocks.num_free == 64


def test_a_sequence_ends_inside_its_guesses_at_eos() -> None:
    scheduler = make_scheduler()
    sequence = add(scheduler, [1, 2, EOS, 4, 1, 2])
    _, (advance,) = step(scheduler, EOS, 4, 1, 2)
    assert advance.token_ids == (EOS,) and sequence.finish_reason == "stop"
    assert not scheduler.has_work and scheduler.blocks.num_free == 64


def test_no_more_is_guessed_than_may_still_come() -> None:
    scheduler = make_scheduler()
    sequence = add(scheduler, [1, 2, 3, 4, 1, 2], max_tokens=3)
    plan, (advance,) = step(scheduler, 3, 4, 1)
    assert plan.sequences[0].num_drafted == 2
    assert advance.token_ids == (3, 4, 1) and sequence.finish_reason == "length"


@pytest.mark.parametrize(
    ("params", "num_drafted"),
    [
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 20, "logprobs": 3, "stop": ("a",)}, 3),
        ({"frequency_penalty": 0.5}, 0),
        ({"repetition_penalty": 1.1}, 0),
        ({"min_p": 0.1}, 0),
        ({"logit_bias": ((7, 1.0),)}, 0),
        ({"bad_words": ("bad",)}, 0),
        ({"thinking_token_budget": 0}, 0),
        ({"structured_outputs": StructuredOutputs(json_object=True)}, 0),
    ],
)
def test_what_is_not_drawn_from_its_logits_alone_is_not_guessed(
    params: dict[str, object], num_drafted: int
) -> None:
    scheduler = make_scheduler()
    add(scheduler, [1, 2, 3, 4, 1, 2], **params)
    assert planned(scheduler).sequences[0].num_drafted == num_drafted


def test_guesses_take_what_a_step_leaves_of_its_budget() -> None:
    scheduler = make_scheduler(tokens=8)
    add(scheduler, [1, 2, 3, 4, 1, 2])
    assert planned(scheduler).sequences[0].num_drafted == 2


def test_a_guess_pays_less_the_more_a_step_computes() -> None:
    for free, num_drafted in [(1000, 3), (6, 1), (5, 0)]:  # the first guess is right with a chance of a half
        scheduler = make_scheduler(free=free)
        add(scheduler, [1, 2, 3, 4, 1, 2])
        assert planned(scheduler).sequences[0].num_drafted == num_drafted


def test_guesses_take_free_blocks_alone() -> None:
    scheduler = make_scheduler(blocks=4)
    add(scheduler, [1, 2, 3, 1, 2, 3, 1, 2])  # its two blocks are full
    add(scheduler, [5, 6, 5, 6, 5], seq_id=2)
    drafted = {part.seq_id: part.num_drafted for part in planned(scheduler).sequences}
    assert drafted == {1: 0, 2: 3} and scheduler.counts.preemptions == 0


def test_planning_waits_where_a_guess_is_in_flight_or_likely() -> None:
    scheduler = make_scheduler()
    assert not scheduler.waits_to_draft
    add(scheduler, [1, 2, 3, 4, 1, 2])
    assert not scheduler.waits_to_draft, "all tokens are known"
    plan = planned(scheduler)
    assert scheduler.waits_to_draft and scheduler.schedule() is None
    scheduler.update(plan, StepResult(plan.step, (9, 9, 9, 9), ()))
    plan = planned(scheduler)
    assert plan.sequences[0].num_drafted == 0
    assert not scheduler.waits_to_draft, "nothing reads like its end"
    assert planned(scheduler).sequences[0].start == 7


def test_a_pipeline_never_waits_to_guess() -> None:
    scheduler = make_scheduler(stages=2)
    add(scheduler, [1, 2, 3, 4, 1, 2])
    add(scheduler, [5, 6, 7], seq_id=2)
    planned(scheduler)
    assert not scheduler.waits_to_draft
