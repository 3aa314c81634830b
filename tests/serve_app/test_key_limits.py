"""Limits of API keys, on a clock that the tests set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen3_dist.request_terms import RequestTerms
from serve_app.apis.completions import parse_completion
from serve_app.apis.embeddings import parse_embedding
from serve_app.ingress.access.control import Access
from serve_app.ingress.access.limits import KeyLimitError, KeyLimits
from serve_app.ingress.http import error_headers
from serve_app.settings import IngressSettings
from serve_app.settings.keys import Key, hash_of
from tests.serve_app.gate import access, request


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def limits_of(clock: Clock, **limits: int) -> tuple[KeyLimits, Key]:
    return KeyLimits(clock), Key("alice", hash_of("x"), **limits)


def retry_after(limits: KeyLimits, key: Key, share: float = 1.0) -> int:
    """The seconds that a refusal names; 0 if the request is admitted."""
    try:
        limits.check(key, share)
    except KeyLimitError as error:
        assert "'alice'" in str(error)
        headers = error_headers(error)
        assert headers is not None
        return int(headers["retry-after"])
    return 0


def test_retry_after_is_the_time_until_a_request_is_admitted_again() -> None:
    clock = Clock()
    limits, key = limits_of(clock, requests_per_minute=4)
    assert [retry_after(limits, key) for _ in range(4)] == [0, 0, 0, 0]
    assert retry_after(limits, key) == 15
    clock.now += 6
    assert retry_after(limits, key) == 9
    clock.now += 8.5
    assert retry_after(limits, key) == 1
    clock.now += 0.5
    assert retry_after(limits, key) == 0
    assert retry_after(limits, key) == 15
    clock.now += 1000
    assert [retry_after(limits, key) for _ in range(5)] == [0, 0, 0, 0, 15]


def test_a_limit_is_divided_among_ingresses_but_admits_some_request() -> None:
    clock = Clock()
    limits, key = limits_of(clock, requests_per_minute=4)
    assert [retry_after(limits, key, share=0.5) for _ in range(3)] == [0, 0, 30]
    limits, key = limits_of(clock, requests_per_minute=1)
    assert [retry_after(limits, key, share=0.5) for _ in range(2)] == [0, 120]


def test_tokens_are_counted_when_they_are_used_and_paid_back_by_waiting() -> None:
    clock = Clock()
    limits, key = limits_of(clock, tokens_per_minute=60)
    assert retry_after(limits, key) == 0
    limits.charge(100)
    assert retry_after(limits, key) == 41
    clock.now += 41
    assert retry_after(limits, key) == 0


def test_requests_at_once_are_limited() -> None:
    clock = Clock()
    limits, key = limits_of(clock, max_concurrent_requests=2)
    with limits.running(key, 1.0), limits.running(key, 1.0):
        assert retry_after(limits, key) == 1
        with pytest.raises(KeyLimitError, match="may run 2 requests at once"), limits.running(key, 1.0):
            raise AssertionError("it was admitted")
        clock.now += 600
    assert retry_after(limits, key) == 0
    with limits.running(key, 1.0), limits.running(key, 1.0):
        assert retry_after(limits, key) == 30  # they took ten minutes, so room comes late


def test_a_changed_limit_forgets_nothing(tmp_path: Path) -> None:
    keys_file = tmp_path / "keys.yaml"

    def write(limit: int) -> None:
        keys_file.write_text(f"keys: [{{name: alice, key: k, requests_per_minute: {limit}}}]\n")

    clock = Clock()
    write(2)
    found = Access(clock=clock)
    found.configure(IngressSettings(keys_file=str(keys_file)))
    for _ in range(2):
        asked = request(x_api_key="k")
        found.check(asked)
        found.check_limits(asked)
    write(60)
    found.reload()
    asked = request(x_api_key="k")
    found.check(asked)
    with pytest.raises(KeyLimitError, match="60 requests per minute; retry in 1 s"):
        found.check_limits(asked)


def test_a_key_limits_priority(tmp_path: Path) -> None:
    keys_file = tmp_path / "keys.yaml"
    keys_file.write_text("keys:\n  - {name: batch, key: b, min_priority: 5}\n  - {name: alice, key: a}\n")
    found = access(keys_file=str(keys_file))

    def priority(key: str, **body: Any) -> int:
        asked = request(x_api_key=key)
        found.check(asked)
        raw = json.dumps({"prompt": "hi", **body}).encode()
        return found.with_terms(asked, parse_completion(raw)).terms.priority

    assert [priority("b"), priority("b", priority=-9), priority("b", priority=7)] == [5, 5, 7]
    assert [priority("a"), priority("a", priority=-9)] == [0, -9]
    asked = request(x_api_key="b")
    found.check(asked)
    assert found.with_terms(asked, parse_embedding(b'{"input": "hi"}')).terms.priority == 5


def test_a_request_has_the_terms_of_its_key_and_of_the_service(tmp_path: Path) -> None:
    keys_file = tmp_path / "keys.yaml"
    keys_file.write_text("keys:\n  - {name: alice, key: a}\n  - {name: bob, key: b}\n")

    def terms(key: str, salt: str | None, **settings: Any) -> RequestTerms:
        found = access(keys_file=str(keys_file), **settings)
        asked = request(x_api_key=key)
        found.check(asked)
        body = json.dumps({"prompt": "hi", "cache_salt": salt}).encode()
        return found.with_terms(asked, parse_completion(body)).terms

    assert terms("a", None) == RequestTerms(client="alice")
    assert terms("a", "s", queue_timeout_s=7.0) == RequestTerms(0, "alice", "s", 7.0)
    salts = {terms(key, salt, cache_per_key=True).cache_salt for key in "ab" for salt in (None, "s", "t")}
    assert len(salts) == 6
    assert access().with_terms(request(), parse_completion(b'{"prompt": "hi"}')).terms == RequestTerms()
