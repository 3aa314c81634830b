"""Refusals that a proxy repeats, without a server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from serve_app import proxy
from serve_app.proxy import HOLDS_HEADER, RepeatedRefusals


class Service:
    """Answers with a status, and says how often it was asked."""

    def __init__(self, status: int, holds_ms: int | None) -> None:
        self.status, self.holds_ms = status, holds_ms
        self.asked = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked += 1
        headers = [(b"retry-after", b"7"), (b"x-request-id", b"%d" % self.asked)]
        if self.holds_ms is not None:
            headers.append((HOLDS_HEADER.encode(), b"%d" % self.holds_ms))
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"no", "more_body": True})
        await send({"type": "http.response.body", "body": b" room", "more_body": False})


def answers(
    service: Service, *paths: str, method: str = "POST"
) -> list[tuple[int, dict[bytes, bytes], bytes]]:
    app = RepeatedRefusals(service)

    async def ask(path: str) -> tuple[int, dict[bytes, bytes], bytes]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        await app({"type": "http", "method": method, "path": path}, None, send)  # type: ignore[arg-type]
        return sent[0]["status"], dict(sent[0]["headers"]), b"".join(m["body"] for m in sent[1:])

    async def ask_all() -> list[tuple[int, dict[bytes, bytes], bytes]]:
        return [await ask(path) for path in paths]

    return asyncio.run(ask_all())


def test_a_refusal_that_holds_is_repeated_for_its_path_alone_and_nobody_is_asked() -> None:
    service = Service(429, holds_ms=3_600_000)
    first, again, other = answers(service, "/v1/completions", "/v1/completions", "/v1/messages")
    assert service.asked == 2
    assert first == (429, {b"retry-after": b"7", b"x-request-id": b"1"}, b"no room")
    status, headers, body = again
    assert (status, headers.keys(), body) == (429, {b"retry-after"}, b"no room")
    assert other[1][b"x-request-id"] == b"2"


@pytest.mark.parametrize(("status", "holds_ms"), [(429, None), (200, 3_600_000), (503, None)])
def test_other_answers_are_asked_for_each_time(status: int, holds_ms: int | None) -> None:
    service = Service(status, holds_ms)
    assert [answer[0] for answer in answers(service, "/v1/completions", "/v1/completions")] == [status] * 2
    assert service.asked == 2


def test_a_refusal_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))  # in seconds
    monkeypatch.setattr(proxy.time, "monotonic", lambda: next(clock))
    service = Service(429, holds_ms=100)
    answers(service, "/v1/completions", "/v1/completions")
    assert service.asked == 2


def test_those_refused_together_are_sent_back_at_different_times() -> None:
    found = answers(Service(429, holds_ms=3_600_000), *["/v1/completions"] * 200)
    assert {int(headers[b"retry-after"]) for _, headers, _ in found} == set(range(3, 11))  # around 7


def test_gets_are_never_refused() -> None:
    service = Service(429, holds_ms=3_600_000)
    answers(service, "/health", "/health", method="GET")
    assert service.asked == 2


def test_many_paths_are_not_remembered() -> None:
    service = Service(429, holds_ms=3_600_000)
    answers(service, *(f"/{n}" for n in range(1000)), "/0")
    assert service.asked == 1001
