"""Who is let in: sequences are counted, not requests."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serve_app.apis.chat.request import parse_chat
from serve_app.apis.completions import parse_completion
from serve_app.apis.embeddings import parse_embedding
from serve_app.apis.messages.request import parse_messages
from serve_app.apis.rerank import parse_rerank, parse_score
from serve_app.apis.tokens import parse_tokenize
from serve_app.ingress.admission import Admission, OverloadedError, with_jitter

USER = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("parse", "body", "sequences"),
    [
        (parse_chat, {"messages": USER}, 1),
        (parse_chat, {"messages": USER, "n": 8}, 8),
        (parse_completion, {"prompt": "hi"}, 1),
        (parse_completion, {"prompt": [5, 6, 7]}, 1),
        (parse_completion, {"prompt": ["a", "b", "c"], "n": 2}, 6),
        (parse_embedding, {"input": ["a"] * 2048}, 2048),
        (parse_rerank, {"query": "q", "documents": ["a", "b"]}, 2),
        (parse_score, {"text_1": "q", "text_2": ["a", "b", "c"]}, 3),
        (parse_messages, {"messages": USER, "max_tokens": 5}, 1),
        (parse_tokenize, {"prompt": "hi"}, 1),
    ],
)
def test_each_choice_of_each_prompt_is_a_sequence(parse: Any, body: dict[str, Any], sequences: int) -> None:
    assert parse(json.dumps(body).encode()).num_sequences == sequences


def test_sequences_beyond_the_limit_are_refused_until_others_end() -> None:
    admission = Admission(lambda: 16, max_per_request=100)
    with admission.admit() as first, admission.admit() as second:
        first.count(8)
        second.count(8)
        with pytest.raises(OverloadedError) as refused:
            admission.check()
        assert refused.value.status == 429 and refused.value.retry_after_s >= 1
    admission.check()
    assert admission.in_flight == 0


def test_a_request_whose_body_was_read_while_others_took_the_room_is_refused() -> None:
    admission = Admission(lambda: 4, max_per_request=4)
    with admission.admit() as late:
        with admission.admit() as large:
            large.count(4)
            with pytest.raises(OverloadedError):
                late.count(1)
        late.count(1)


def test_a_request_larger_than_the_limit_is_admitted_where_there_is_room_and_counts_no_more_than_one_may() -> (
    None
):
    admission = Admission(lambda: 10, max_per_request=4)
    with admission.admit() as large:
        large.count(2048)
        assert admission.in_flight == 4
        admission.check()
    assert admission.in_flight == 0


def test_an_ingress_takes_its_share_and_tells_the_limit_of_the_service() -> None:
    ingresses = [1]
    admission = Admission(lambda: 5, max_per_request=9, num_ingresses=lambda: ingresses[0])
    with admission.admit() as running:
        running.count(3)
        admission.check()
        ingresses[0] = 2
        assert admission.share() == 3
        with pytest.raises(OverloadedError) as refused:
            admission.check()
        assert refused.value.limit == 5
        ingresses[0] = 1  # one was lost: what it took is this one's now
        admission.check()


def test_clients_are_told_to_come_again_when_those_in_flight_have_probably_ended() -> None:
    admission = Admission(lambda: 1, max_per_request=1)
    with admission.admit(), pytest.raises(OverloadedError) as refused:
        admission.check()  # nothing has ended yet, so nothing is known
    assert refused.value.retry_after_s == 1
    with admission.admit(), pytest.raises(OverloadedError) as refused:
        admission.check()
    assert 1 <= refused.value.retry_after_s <= 30


def test_clients_that_are_told_the_longest_time_do_not_all_come_again_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("serve_app.ingress.admission.time.monotonic", lambda: now[0])
    slow = Admission(lambda: 1, max_per_request=1)
    with slow.admit():
        pass
    now[0] = 1000.0
    with slow.admit():
        told = {slow.retry_after_s() for _ in range(500)}
    assert len(told) > 10 and min(told) >= 10 and max(told) == 30
    assert max(with_jitter(each) for each in told for _ in range(500)) == 30  # a proxy's, of what it was told
