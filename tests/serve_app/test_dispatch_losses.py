"""What is told of the replicas that requests lose, and what is lost with a replica."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from qwen3_dist.errors import EngineDeadError, RequestError
from qwen3_dist.request_terms import RequestTerms
from serve_app.apis.embeddings import parse_embedding
from serve_app.apis.shared.answer import DIED, LEFT, Running
from serve_app.ingress.dispatch import Dispatcher
from serve_app.ingress.progress import Progress
from tests.serve_app.resuming import asked
from tests.serve_app.scripted_replicas import ACCEPTED, DEAD, REQUEST, RUNNING, WHOLE, Answer, Replicas

WAITS = Running("r1", waits=True)
GONE = EngineDeadError("gone")


@pytest.mark.parametrize("lost", [DEAD, (503, DIED), GONE])
def test_replicas_did_not_die_of_a_request_that_only_waited_there(lost: Any) -> None:
    waited = [RUNNING, WAITS, lost]
    assert Replicas(*[waited] * 4, [RUNNING, lost], waited, WHOLE).got() == WHOLE


@pytest.mark.parametrize("between", [[], [[RUNNING, WAITS, GONE]]])
def test_a_request_that_waited_first_is_stopped_once_two_replicas_were_lost_that_had_begun_it(
    between: list[Any],
) -> None:
    begun = [RUNNING, WAITS, RUNNING, GONE]
    replicas = Replicas(begun, *between, begun, WHOLE)
    with pytest.raises(RequestError, match="2 replicas were lost while they ran this request"):
        replicas.got()
    assert len(replicas.asked) == 2 + len(between)


def test_a_request_does_not_lose_replicas_in_whose_queues_it_waits_for_ever() -> None:
    replicas = Replicas(*[[RUNNING, WAITS, GONE]] * 1000)
    with pytest.raises(EngineDeadError, match="no other ran it within 0.05 s; send it again"):
        replicas.got(resume_s=0.05, pauses_s=(0.001,))
    assert len(replicas.asked) > 2
    progress = Progress(lost_s=7.0, runs=True, waits=True)
    progress.lose()
    assert progress.lost_s == 7.0
    progress.runs, progress.waits = True, False
    progress.lose()
    assert progress.lost_s is None  # it had begun


@pytest.mark.parametrize(
    ("tries", "lost"),
    [
        ([[DEAD]], [("", False)]),
        ([[RUNNING, DEAD]], [("r1", False)]),
        ([[RUNNING, (503, DIED)]], [("r1", True)]),
        ([[RUNNING, (503, LEFT)]], [("r1", False)]),
        ([[RUNNING, EngineDeadError("gone")], [(503, LEFT)]], [("r1", True), ("", False)]),
    ],
)
def test_the_replica_that_a_request_lost_is_told_and_whether_it_died(tries: Any, lost: Any) -> None:
    replicas = Replicas(*tries, WHOLE)
    assert replicas.got() == WHOLE and replicas.lost == lost


@pytest.mark.parametrize("begun", [[], [RUNNING], [RUNNING, (200, b"head")]])
def test_requests_of_a_replica_that_is_given_up_go_on_elsewhere(begun: list[Any]) -> None:
    class Hangs(Answer):
        def cancel(self) -> None:
            super().cancel()
            given_up.set()

    given_up = asyncio.Event()

    async def hang() -> None:
        dispatcher.lose("r2")
        assert given_up.is_set() == (not begun)
        dispatcher.lose("r1")
        await given_up.wait()
        raise EngineDeadError("the call was cancelled")

    replicas = Replicas(begun, [Running("r2"), (200, b"whole")])
    replicas.answers[0] = Hangs([*begun, hang])
    dispatcher = Dispatcher(replicas.send, on_loss=replicas.lose, pauses_s=(0.0,))

    async def collect() -> list[Any]:
        return [item async for item in dispatcher.answer(REQUEST, "id")]

    assert asyncio.run(asyncio.wait_for(collect(), 60))[-1] in ((200, b"whole"), b"whole")
    assert replicas.lost == [("r1" if begun else "", True)]
    assert not any(dispatcher._calls.values())


@pytest.mark.parametrize(
    ("request_", "lost", "may_be_refused"),
    [
        (asked("chat"), [DEAD], True),
        (asked("chat"), [RUNNING, DEAD], True),  # it waited: streams are accepted once they run
        (asked("chat"), [RUNNING, ACCEPTED, DEAD], False),
        (asked("chat", stream=False), [DEAD], True),
        (asked("chat", stream=False), [RUNNING, DEAD], False),
        (parse_embedding(b'{"input": "a"}'), [RUNNING, DEAD], False),
    ],
)
def test_a_request_that_has_begun_is_not_refused_in_the_queue_of_another_replica(
    request_: Any, lost: list[Any], may_be_refused: bool
) -> None:
    replicas = Replicas(lost, WHOLE)
    dispatcher = Dispatcher(replicas.send, pauses_s=(0.0,))
    limited = dataclasses.replace(request_, terms=RequestTerms(priority=3, queue_timeout_s=5.0))

    async def collect() -> list[Any]:
        return [item async for item in dispatcher.answer(limited, "id")]

    assert asyncio.run(collect())[-1] == b"part"
    first, again = (each.terms for each in replicas.requests)
    assert first == limited.terms
    assert bool(again.suspect) == (lost[0] is RUNNING)
    assert again == RequestTerms(3, queue_timeout_s=5.0 if may_be_refused else 0.0, suspect=again.suspect)
