"""What a proxy refuses by itself, without a server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from serve_app.ingress import proxy
from serve_app.ingress.admission import MAX_IN_FLIGHT_HEADER, REFUSE_FOR_HEADER
from serve_app.ingress.proxy import OverloadMiddleware

Answer = tuple[int, dict[bytes, bytes], bytes]


class Service:
    """Answers 200 and keeps the request until `end` while fewer than `limit` are; else refuses for `refuse_for_ms`."""

    def __init__(self, limit: int = 2, refuse_for_ms: int = 0) -> None:
        self.limit, self.refuse_for_ms = limit, refuse_for_ms
        self.asked = self.kept = 0
        self.end = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked += 1
        headers = [(MAX_IN_FLIGHT_HEADER.encode(), b"%d" % self.limit), (b"x-request-id", b"%d" % self.asked)]
        takes = self.kept < self.limit
        if not takes:
            headers += [(REFUSE_FOR_HEADER.encode(), b"%d" % self.refuse_for_ms), (b"retry-after", b"7")]
        await send({"type": "http.response.start", "status": 200 if takes else 429, "headers": headers})
        if takes:
            self.kept += 1
            await self.end.wait()
            self.kept -= 1
        await send({"type": "http.response.body", "body": b"of the service", "more_body": False})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, to be set."""
    now = [100.0]
    monkeypatch.setattr(proxy.time, "monotonic", lambda: now[0])
    return now


async def ask(app: Any, path: str = "/v1/completions", method: str = "POST", **headers: str) -> Answer:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    await app({"type": "http", "method": method, "path": path, "headers": named}, None, send)
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(m["body"] for m in sent[1:])


async def keep(app: Any, number: int) -> list[asyncio.Task[Answer]]:
    """Requests that are in flight when this returns."""
    tasks = [asyncio.create_task(ask(app)) for _ in range(number)]
    for _ in range(5):
        await asyncio.sleep(0)
    return tasks


def test_what_the_service_tells_proxies_does_not_reach_clients() -> None:
    async def run() -> None:
        service = Service()
        service.end.set()
        app = OverloadMiddleware(service)
        assert await ask(app) == (200, {b"x-request-id": b"1"}, b"of the service")
        service.limit = 0  # it tells none with some refusals, after which others are passed on
        told = {b"x-request-id": b"2", b"retry-after": b"7"}
        assert await ask(app) == (429, told, b"of the service")
        service.limit = 2
        assert (await ask(app))[0] == 200

    asyncio.run(run())


def test_no_more_are_passed_on_than_the_service_takes_but_one_a_second(clock: list[float]) -> None:
    async def run() -> None:
        service = Service(limit=2)
        app = OverloadMiddleware(service)
        kept = await keep(app, 2)
        assert [(await ask(app))[0] for _ in range(3)] == [429] * 3
        assert service.asked == 2
        clock[0] += 1.1
        assert [(await ask(app))[0] for _ in range(3)] == [429] * 3
        assert service.asked == 3  # the service refused one itself

        service.limit = 6  # a replica came
        assert (await ask(app))[0] == 429
        clock[0] += 1.1
        kept += await keep(app, 1)  # finds that out
        kept += await keep(app, 3)
        assert (service.kept, service.asked) == (6, 7)
        service.end.set()
        assert [status for status, *_ in await asyncio.gather(*kept)] == [200] * 6
        assert (await ask(app))[0] == 200
        assert not app._in_flight

    asyncio.run(run())


def test_a_refusal_of_the_service_holds_for_its_path_alone(clock: list[float]) -> None:
    async def run() -> None:
        service = Service(limit=2, refuse_for_ms=300)
        service.kept = 2  # of other proxies
        app = OverloadMiddleware(service)
        assert (await ask(app))[2] == b"of the service"
        clock[0] += 0.29
        status, headers, _ = await ask(app)
        assert (status, service.asked) == (429, 1)
        assert 3 <= int(headers[b"retry-after"]) <= 10
        assert (await ask(app, "/v1/messages"))[2] == b"of the service"
        clock[0] += 0.02
        assert (await ask(app))[2] == b"of the service"
        assert service.asked == 3

    asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "headers", "anthropic"),
    [
        ("/v1/completions", {}, False),
        ("/v1/messages", {}, True),
        ("/below/v1/messages", {}, True),
        ("/v1/completions", {"anthropic_version": "2023-06-01"}, True),
    ],
)
def test_a_refusal_has_the_form_of_its_api(path: str, headers: dict[str, str], anthropic: bool) -> None:
    async def run() -> None:
        service = Service(limit=2, refuse_for_ms=3_600_000)
        service.kept = 2
        app = OverloadMiddleware(service)
        await ask(app, path)
        status, told, body = await ask(app, path, **headers)
        assert (status, service.asked) == (429, 1)
        message = (
            f"the service already has 2 sequences running or waiting; retry in {int(told[b'retry-after'])} s"
        )
        error = {
            "message": message,
            "type": "invalid_request_error",
            "param": None,
            "code": "rate_limit_exceeded",
        }
        assert told[b"content-type"] == b"application/json"
        if anthropic:
            assert json.loads(body) == {
                "type": "error",
                "error": {"type": "rate_limit_error", "message": message},
            }
        else:
            assert json.loads(body) == {"error": error}

    asyncio.run(run())


def test_those_refused_together_are_sent_back_at_different_times() -> None:
    async def run() -> set[int]:
        service = Service(limit=1, refuse_for_ms=3_600_000)
        service.kept = 1
        app = OverloadMiddleware(service)
        await ask(app)
        return {int((await ask(app))[1][b"retry-after"]) for _ in range(200)}

    assert asyncio.run(run()) == set(range(3, 11))  # around 7


def test_gets_are_never_refused() -> None:
    async def run() -> None:
        service = Service(refuse_for_ms=3_600_000)
        service.kept = 2
        app = OverloadMiddleware(service)
        for _ in range(2):
            await ask(app, "/health", method="GET")
        assert service.asked == 2

    asyncio.run(run())


def test_many_paths_are_not_remembered() -> None:
    async def run() -> None:
        service = Service(refuse_for_ms=3_600_000)
        service.kept = 2
        app = OverloadMiddleware(service)
        for path in [*(f"/{n}" for n in range(1000)), "/0"]:
            await ask(app, path)
        assert service.asked == 1001
        assert len(app._limits) <= 64

    asyncio.run(run())
