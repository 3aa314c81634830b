"""Sending requests to replicas, which fail in every way that Serve shows, without a server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest

from qwen3_dist.errors import EngineDeadError, QwenDistError, RequestError
from serve_app.apis.shared.answer import LEFT, Counted
from serve_app.apis.shared.errors import error_object, to_json
from serve_app.ingress import dispatch
from serve_app.ingress.dispatch import Dispatcher
from serve_app.telemetry.summary import LastPart, RequestSummary
from tests.serve_app.scripted_replicas import ACCEPTED, DEAD, REQUEST, RUNNING, WHOLE, Replicas

LOSSES: list[Any] = [EngineDeadError("gone"), DEAD]


@pytest.mark.parametrize(("taken", "tokens"), [(1, 5), (2, 5), (3, 9)])
def test_tokens_are_charged_as_far_as_parts_were_taken_and_once_for_a_replica_that_was_lost(
    taken: int, tokens: int
) -> None:
    accepted, parts = Counted((200, b""), 0), [Counted(b"a", 5), Counted(b"b", 5), Counted(b"c", 9)]
    replicas = Replicas([accepted, DEAD], [accepted, *parts])
    charged: list[int] = []
    counted: list[Counted] = []

    async def take() -> list[Any]:
        dispatcher = Dispatcher(replicas.send, pauses_s=(0.0,))
        answer = dispatcher.answer("request", "id", charge=charged.append, on_count=counted.append)
        async with aclosing(answer) as items:
            return [await anext(items) for _ in range(taken + 1)]

    assert asyncio.run(take()) == [(200, b""), b"a", b"b", b"c"][: taken + 1]
    assert sum(charged) == counted[-1].tokens == tokens and replicas.answers[1].cancelled


@pytest.mark.parametrize("loss", LOSSES)
def test_a_request_that_has_shown_nothing_is_sent_again_when_its_replica_is_lost(loss: Any) -> None:
    replicas = Replicas([loss], [loss], WHOLE)
    assert replicas.got() == WHOLE
    assert (replicas.asked, replicas.losses) == (["id"] * 3, 2)
    assert all(answer.cancelled for answer in replicas.answers)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_stream_that_is_accepted_and_has_shown_nothing_is_sent_again(loss: Any) -> None:
    replicas = Replicas([ACCEPTED, loss], [loss], [ACCEPTED, b"a", b"b"])
    assert replicas.got() == [ACCEPTED, b"a", b"b"]
    assert len(replicas.asked) == 3


def test_a_stream_that_another_replica_refuses_after_the_first_was_lost_ends_with_the_error() -> None:
    body = to_json(error_object(RequestError("no", "input", 404, "gone")))
    replicas = Replicas([ACCEPTED, DEAD], [(404, body)])
    with pytest.raises(RequestError, match="no") as refused:
        replicas.got()
    assert (refused.value.status, refused.value.param) == (404, "input")


def part(text: bytes, tokens: int, *token_ids: int) -> Counted:
    return Counted(text, tokens, sent=((0, token_ids, None, 0, b""),))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_stream_that_has_begun_goes_on_at_another_replica(loss: Any) -> None:
    accepted = Counted(ACCEPTED, 0, model="checkpoint")
    replicas = Replicas([accepted, part(b"a", 5, 1, 2), loss], [DEAD], [accepted, part(b"b", 6, 3)])
    assert replicas.got() == [ACCEPTED, b"a", b"b"]
    first, *others = replicas.resumes
    assert first is None
    for resume in others:
        assert resume is not None and resume.model == "checkpoint"
        assert resume.choices[0].token_ids.tolist() == [1, 2]


def test_a_request_that_two_replicas_were_lost_with_is_not_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    replicas = Replicas([ACCEPTED, b"a", DEAD], [DEAD], [ACCEPTED, DEAD], [ACCEPTED, b"b"])
    with pytest.raises(RequestError, match="2 replicas were lost while they ran this request") as told:
        replicas.got()
    assert told.value.status == 500 and len(replicas.asked) == 3
    assert any("id ran on 2 replicas" in record.getMessage() for record in caplog.records)


def test_a_stream_that_got_further_on_each_replica_is_tried_on_the_next() -> None:
    replicas = Replicas(*[[ACCEPTED, part(b"%d" % n, n, n), DEAD] for n in range(1, 6)], [ACCEPTED, b"end"])
    assert replicas.got() == [ACCEPTED, b"1", b"2", b"3", b"4", b"5", b"end"]


def test_a_whole_answer_that_two_replicas_were_lost_with_is_not_tried_again() -> None:
    replicas = Replicas([RUNNING, DEAD], [DEAD], [RUNNING, DEAD], [RUNNING, (200, b"whole")])
    with pytest.raises(RequestError, match="not tried again"):
        replicas.got()
    replicas = Replicas([RUNNING, DEAD], [DEAD], [DEAD], [RUNNING, (200, b"whole")])
    assert replicas.got() == [(200, b"whole")]


def test_a_whole_answer_that_got_further_on_each_replica_goes_on_at_the_next() -> None:
    tries = [[RUNNING, part(b"", n, n), DEAD] for n in range(1, 6)]
    replicas = Replicas(*tries, [RUNNING, (200, b"whole")])
    assert replicas.got() == [(200, b"whole")]
    *_, last = replicas.resumes
    assert last is not None and last.choices[0].token_ids.tolist() == [1, 2, 3, 4, 5]
    replicas = Replicas(*tries, [RUNNING, DEAD], [RUNNING, (200, b"whole")])
    with pytest.raises(RequestError, match="not tried again"):
        replicas.got()


def test_it_is_told_how_often_a_replica_took_the_request_of_one_that_was_lost() -> None:
    first = [RUNNING, ACCEPTED, part(b"a", 1, 1), DEAD]
    replicas = Replicas(first, [DEAD], [RUNNING, ACCEPTED, part(b"b", 2, 2), DEAD], [RUNNING, ACCEPTED, b"c"])
    resumed: list[None] = []

    async def take() -> list[Any]:
        answer = Dispatcher(replicas.send, pauses_s=(0.0,)).answer(
            REQUEST, "id", on_resume=lambda: resumed.append(None)
        )
        return [item async for item in answer]

    assert asyncio.run(take()) == [ACCEPTED, b"a", b"b", b"c"] and len(resumed) == 2


@pytest.mark.parametrize(
    ("first", "resume_s", "words"),
    [
        ([DEAD], 0.0, "the model's replica was just lost; send the request again"),
        ([DEAD], 0.01, "no replica took this request within 0.01 s; send it again"),
        ([RUNNING, DEAD], 0.0, "the replica that ran this request was lost; send it again"),
    ],
)
def test_a_request_that_failed_for_want_of_a_replica_is_told_what_happened(
    first: list[Any], resume_s: float, words: str
) -> None:
    with pytest.raises(EngineDeadError) as told:
        Replicas(first, *[[DEAD]] * 1000).got(resume_s=resume_s, pauses_s=(0.001,))
    assert str(told.value) == words


def test_a_replica_that_was_told_to_leave_did_not_die_of_its_request() -> None:
    told = (503, LEFT)
    replicas = Replicas(*[[RUNNING, told]] * 4, [RUNNING, (200, b"whole")])
    assert replicas.got() == [(200, b"whole")]
    replicas = Replicas([RUNNING, DEAD], [RUNNING, told], [RUNNING, DEAD], [RUNNING, (200, b"whole")])
    with pytest.raises(RequestError, match="2 replicas were lost while they ran this request"):
        replicas.got()
    streams = Replicas(
        [RUNNING, DEAD], [RUNNING, ACCEPTED, part(b"a", 1, 1), told], [RUNNING, DEAD], [RUNNING, b"b"]
    )
    assert streams.got() == [ACCEPTED, b"a", b"b"]


@pytest.mark.parametrize("hangs", [False, True])
def test_a_request_that_no_replica_takes_in_time_fails(hangs: bool) -> None:
    then = [lambda: asyncio.sleep(60)] if hangs else [DEAD]
    replicas = Replicas([ACCEPTED, b"a", DEAD], *[then] * 1000)
    with pytest.raises(EngineDeadError, match="no other ran it within 0.05 s; send it again"):
        replicas.got(resume_s=0.05, pauses_s=(0.001,))
    assert len(replicas.asked) >= 2


def test_pings_come_while_a_begun_stream_waits_for_a_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_PING_PERIOD_S", 0.001)
    accepted = [lambda: asyncio.sleep(0.05), ACCEPTED]
    replicas = Replicas([ACCEPTED, b"a", DEAD], [*accepted, b"b"])
    _, a, *pings, b = replicas.got()
    assert (a, b) == (b"a", b"b") and pings and set(pings) == {REQUEST.ping}


def test_a_replica_that_is_lost_after_the_last_part_costs_nothing() -> None:
    last = LastPart.of(b"b", RequestSummary())
    replicas = Replicas([ACCEPTED, b"a", Counted(last, 5), EngineDeadError("gone")])
    assert replicas.got() == [ACCEPTED, b"a", b"b"]


@pytest.mark.parametrize(
    "bug",
    [
        TypeError("secret"),
        TimeoutError("secret"),
        RuntimeError("secret"),
    ],
)
@pytest.mark.parametrize("before", [[], WHOLE])
def test_a_bug_is_500_with_the_requests_id_and_its_traceback_is_logged(
    bug: Exception, before: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    replicas = Replicas([*before, bug], WHOLE)
    with caplog.at_level(logging.ERROR, logger="ray.serve"), pytest.raises(RequestError) as told:
        replicas.got()
    assert told.value.status == 500 and "request id" in str(told.value)
    assert "secret" not in str(told.value) and "lost" not in str(told.value)
    assert len(replicas.asked) == 1


def test_a_request_that_a_replica_refused_is_not_sent_again() -> None:
    for status in (400, 429, 500):
        replicas = Replicas([(status, b"refused")], WHOLE)
        assert replicas.got() == [(status, b"refused")]
        assert len(replicas.asked) == 1


def test_all_tries_together_take_no_longer_than_a_request_may() -> None:
    replicas = Replicas([DEAD], [DEAD], [DEAD])
    with pytest.raises(RequestError) as told:
        replicas.got(timeout_s=0.05, pauses_s=(60.0,))
    assert told.value.status == 408 and len(replicas.asked) == 1


def test_a_stream_that_takes_longer_than_a_request_may_ends() -> None:
    replicas = Replicas([ACCEPTED, b"a", lambda: asyncio.sleep(60)])
    with pytest.raises(RequestError, match="longer than 0.05 seconds") as told:
        replicas.got(timeout_s=0.05)
    assert told.value.status == 408 and len(replicas.asked) == 1 and replicas.answers[0].cancelled


@pytest.mark.parametrize("items", [[DEAD], [lambda: asyncio.sleep(60)]])
def test_a_client_that_leaves_ends_the_tries(items: list[Callable[[], Any] | Any]) -> None:
    replicas = Replicas(items, WHOLE)

    async def leave() -> None:
        answer = Dispatcher(replicas.send, pauses_s=(60.0,)).answer("request", "id")
        waiting = asyncio.ensure_future(anext(answer))
        while not replicas.asked:
            await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(leave())
    assert len(replicas.asked) == 1 and replicas.answers[0].cancelled


def test_errors_of_ours_pass_as_they_are() -> None:
    refusal: QwenDistError = RequestError("no", param="prompt")
    with pytest.raises(RequestError) as told:
        Replicas([refusal]).got()
    assert told.value is refusal
