"""What is remembered of the replicas' health."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from serve_app.ingress.replica_health import ReplicaHealth
from serve_app.replica_status import ReplicaStatus

Answers = list[ReplicaStatus | BaseException]
WELL = ReplicaStatus("")


def healthy_after(*rounds: Answers | Exception, patience_s: float = 60.0) -> list[int]:
    """The number of healthy replicas after each round of answers."""

    async def collect() -> list[int]:
        given = iter([[], *rounds])

        async def ask() -> Answers:
            answers = next(given)
            if isinstance(answers, Exception):
                raise answers
            return answers

        health = ReplicaHealth(ask, 3600.0, patience_s)
        health.stop()  # asked below instead
        await health.refresh()
        numbers = []
        for _ in rounds:
            await health.refresh()
            numbers.append(health.num_healthy)
        return numbers

    return asyncio.run(collect())


def test_replicas_that_answer_are_healthy_until_their_engine_or_actor_is_dead() -> None:
    assert healthy_after(
        [WELL, WELL], [WELL, ReplicaStatus("a step has run for 9 s")], [ActorDiedError()], []
    ) == [
        2,
        1,
        0,
        0,
    ]


@pytest.mark.parametrize("late", [TimeoutError(), [TimeoutError()], RuntimeError("the controller is away")])
def test_replicas_that_are_too_busy_to_answer_keep_the_health_they_had(late: Any) -> None:
    assert healthy_after([WELL], late, late, [WELL]) == [1, 1, 1, 1]
    assert healthy_after([WELL], late, patience_s=0.0) == [1, 0]


def test_a_replica_that_died_is_counted_once_however_often_serve_still_names_it() -> None:
    async def lost() -> int:
        rounds: Any = iter(
            [
                [],
                [WELL, WELL],
                [WELL, ActorDiedError()],
                [WELL, ActorDiedError()],
                [WELL, ReplicaStatus("a rank was lost")],
            ]
        )

        async def ask() -> Answers:
            answers: Answers = next(rounds)
            return answers

        health = ReplicaHealth(ask, 3600.0, 60.0)
        health.stop()
        for _ in range(5):
            await health.refresh()
        return health.num_lost

    assert asyncio.run(lost()) == 1


def test_a_lost_request_has_all_replicas_asked_at_once() -> None:
    answers: Answers = [WELL]

    async def ask() -> Answers:
        return answers

    async def lose() -> None:
        health = ReplicaHealth(ask, 3600.0, 60.0)
        while health.num_healthy != 1:
            await asyncio.sleep(0)
        answers[:] = [ReplicaStatus("a rank was lost")]
        health.poll_soon()
        while health.num_healthy:
            await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(lose(), 60))


@pytest.mark.parametrize("answers", [[WELL], RuntimeError("the controller is away")])
def test_the_first_poll_can_be_waited_for_whatever_comes_of_it(answers: Any) -> None:
    async def number() -> int:
        asked = asyncio.Event()

        async def ask() -> Answers:
            await asked.wait()
            if isinstance(answers, Exception):
                raise answers
            return list(answers)

        health = ReplicaHealth(ask, 3600.0, 60.0)
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
        health = ReplicaHealth(lambda: asyncio.Future(), 3600.0, 60.0)
        waits = asyncio.create_task(health.known())
        await asyncio.sleep(0)
        health.stop()
        await waits

    asyncio.run(run())
