"""Slots go to clients in turn: one that sends much waits longer, not the others."""

from __future__ import annotations

from qwen3_dist.engine.scheduler import Scheduler
from qwen3_dist.engine.sequence import Sequence
from tests.scheduling import make_scheduler, make_sequence


def add(scheduler: Scheduler, seq_id: int, client: str, priority: int = 0) -> Sequence:
    sequence = make_sequence(seq_id, 3, max_tokens=50, priority=priority)
    sequence.client = client
    scheduler.add(sequence)
    return sequence


def admitted(scheduler: Scheduler) -> list[int]:
    """The sequences that the next step adds to those that run."""
    before = set(scheduler.running)
    scheduler.schedule()
    return sorted(sequence.seq_id for sequence in scheduler.running if sequence not in before)


def test_a_client_that_comes_late_gets_the_next_slot_and_then_its_share() -> None:
    scheduler = make_scheduler(seqs=2)
    flood = [add(scheduler, seq_id, "flood") for seq_id in range(6)]
    assert admitted(scheduler) == [0, 1]
    for seq_id in (10, 11):
        add(scheduler, seq_id, "late")
    scheduler.finish(flood[0], "abort")
    assert admitted(scheduler) == [10]
    scheduler.finish(flood[1], "abort")
    assert admitted(scheduler) == [2]  # each has one slot then
    scheduler.finish(scheduler.running[0], "abort")
    scheduler.finish(scheduler.running[0], "abort")
    assert admitted(scheduler) == [3, 11]


def test_requests_of_one_client_run_in_the_order_in_which_they_came() -> None:
    scheduler = make_scheduler(seqs=2)
    sequences = [add(scheduler, seq_id, "one") for seq_id in range(4)]
    assert admitted(scheduler) == [0, 1]
    scheduler.finish(sequences[1], "abort")
    assert admitted(scheduler) == [2]


def test_priority_decides_between_clients_before_their_shares_do() -> None:
    scheduler = make_scheduler(seqs=2)
    first = add(scheduler, 0, "urgent", priority=-5)
    add(scheduler, 1, "urgent", priority=-5)
    assert admitted(scheduler) == [0, 1]
    add(scheduler, 2, "batch", priority=5)
    add(scheduler, 3, "urgent", priority=-5)
    scheduler.finish(first, "abort")
    assert admitted(scheduler) == [3]


def test_choices_of_a_request_count_for_its_client() -> None:
    scheduler = make_scheduler(seqs=3)
    choices = [add(scheduler, seq_id, "many") for seq_id in range(4)]
    for choice in choices:
        choice.request_id = "n=4"
    assert admitted(scheduler) == [0, 1, 2]
    add(scheduler, 10, "many")
    add(scheduler, 11, "few")
    scheduler.finish(choices[0], "abort")
    assert admitted(scheduler) == [11]
