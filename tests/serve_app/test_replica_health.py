"""What is remembered of the replicas' health."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from serve_app.ingress import replica_health
from serve_app.ingress.replica_health import Poll, ReplicaHealth
from serve_app.ingress.replica_table import ReplicaTable
from serve_app.replica_status import ReplicaStatus

A, B = (ReplicaStatus("", replica=name, actor=f"actor of {name}") for name in "ab")
B_IS_ILL = B._replace(problem="a step has run for 9 s")


def died(actor: str) -> ActorDiedError:
    error = ActorDiedError()
    error.actor_id = actor
    return error


def watched(ask: Callable[[], Awaitable[Poll]], patience_s: float = 60.0, **options: Any) -> ReplicaHealth:
    return ReplicaHealth(ask, 3600.0, patience_s, ReplicaTable(), **options)


def after(
    *rounds: list[Any] | Exception, running: tuple[str, ...] = ("a", "b"), **options: Any
) -> list[tuple[int, int]]:
    """The numbers of healthy and of lost replicas after each round of answers."""

    async def collect() -> list[tuple[int, int]]:
        given = iter(rounds)

        async def ask() -> Poll:
            answers = next(given)
            if isinstance(answers, Exception):
                raise answers
            return Poll(running, answers)

        health = watched(ask, **options)
        health.stop()  # asked below instead
        numbers = []
        for _ in rounds:
            await health.refresh()
            numbers.append((health.num_healthy, health.num_lost))
        return numbers

    return asyncio.run(collect())


def test_replicas_that_answer_are_healthy_until_their_engine_or_actor_is_dead() -> None:
    numbers = after([A, B], [A, B_IS_ILL], [died("actor of a"), died("actor of b")], [])
    assert [healthy for healthy, _ in numbers] == [2, 1, 0, 0]


@pytest.mark.parametrize(
    "late",
    [
        TimeoutError(),
        [TimeoutError()],
        [ActorUnavailableError("busy", None)],
        RuntimeError("the controller is away"),
    ],
)
def test_replicas_that_are_too_busy_to_answer_keep_the_health_they_had(late: Any) -> None:
    assert after([A], late, late, [A]) == [(1, 0)] * 4
    assert after([A], late, patience_s=0.0) == [(1, 0), (0, 0)]


def test_a_replica_that_died_is_counted_once_however_often_serve_still_names_it() -> None:
    dead = died("actor of b")
    numbers = after([A, B], [A, dead], [A, dead], [A, B_IS_ILL], [A, died("one that never answered")])
    assert [lost for _, lost in numbers] == [0, 1, 1, 1, 2]


def test_the_first_healthy_replica_is_found_long_before_the_next_period(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replica_health, "_NONE_PERIOD_S", 0.0)

    async def wait() -> None:
        rounds = iter([[], [B_IS_ILL], [A]])

        async def ask() -> Poll:
            return Poll(("a", "b"), next(rounds))

        health = watched(ask)
        while not health.num_healthy:
            await asyncio.sleep(0)
        health.stop()

    asyncio.run(asyncio.wait_for(wait(), 20))


@pytest.mark.parametrize("answer", [died("actor of b"), B_IS_ILL, TimeoutError()])
def test_a_replica_that_is_dead_ill_or_silent_takes_no_request(answer: Any) -> None:
    table = ReplicaTable()

    async def poll() -> None:
        rounds = iter([[A, B], [A, answer]])

        async def ask() -> Poll:
            return Poll(("a", "b"), next(rounds))

        health = ReplicaHealth(ask, 3600.0, 60.0, table)
        health.stop()
        for _ in range(2):
            await health.refresh()

    asyncio.run(poll())
    assert table.choose(["a", "b"], b"") == "a"


@pytest.mark.parametrize(("is_dead", "lost"), [(True, 1), (False, 0)])
def test_a_request_that_lost_its_replica_has_all_asked_at_once_and_counts_the_dead(
    is_dead: bool, lost: int
) -> None:
    answers = [A]

    async def ask() -> Poll:
        return Poll(("a",), answers)

    async def lose() -> int:
        health = watched(ask)
        while health.num_healthy != 1:
            await asyncio.sleep(0)
        answers[:] = [A._replace(problem="a rank was lost")]
        health.lose_request("a", is_dead)
        health.lose_request("a", is_dead)
        while health.num_healthy:
            await asyncio.sleep(0)
        assert health.num_request_losses == 2
        health.stop()
        return health.num_lost

    assert asyncio.run(asyncio.wait_for(lose(), 60)) == lost


@pytest.mark.parametrize(
    ("silent_s", "other", "expected"), [(0.0, A, ["b", "b"]), (60.0, A, []), (0.0, B_IS_ILL, [])]
)
def test_a_silent_replica_is_given_up_while_another_is_healthy(
    silent_s: float, other: ReplicaStatus, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica_health, "SILENT_S", silent_s)
    silent: list[str] = []
    other = other._replace(replica="a")
    after([other, B], [other, TimeoutError()], [other, TimeoutError()], [other, B], on_silent=silent.append)
    assert silent == expected


@pytest.mark.parametrize("answers", [[A], RuntimeError("the controller is away")])
def test_the_first_poll_can_be_waited_for_whatever_comes_of_it(answers: Any) -> None:
    async def number() -> int:
        asked = asyncio.Event()

        async def ask() -> Poll:
            await asked.wait()
            if isinstance(answers, Exception):
                raise answers
            return Poll(("a",), answers)

        health = watched(ask)
        waits = asyncio.create_task(health.known())
        for _ in range(5):
            await asyncio.sleep(0)
        assert not waits.done()
        asked.set()
        await waits
        health.stop()
        return health.num_healthy

    assert asyncio.run(number()) == (1 if isinstance(answers, list) else 0)


def test_nobody_waits_for_the_health_of_a_model_that_was_removed() -> None:
    async def run() -> None:
        health = watched(lambda: asyncio.Future())
        waits = asyncio.create_task(health.known())
        await asyncio.sleep(0)
        health.stop()
        await waits

    asyncio.run(run())
