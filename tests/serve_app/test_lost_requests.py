"""Requests whose ingress is lost are sent to another one, as long as nothing of the answer was sent."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from ray import serve

from serve_app.ingress import lost_requests, proxy
from serve_app.ingress.lost_requests import MAX_KEPT_BYTES, LostRequestMiddleware

BODY = [b"{", b"}"]


class Serve:
    """Serve's proxy: loses the first `losses` requests after it has read their bodies, and answers the others.

    It changes the scope and goes on to listen for a client that leaves, as Serve does.
    """

    def __init__(self, losses: int, breaks: bool = False, part: bytes = b"", kind: str = "") -> None:
        self.losses, self.breaks, self.part = losses, breaks, part
        self.headers = [(b"Content-Type", kind.encode())] if kind else []
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["headers"] == [(b"a", b"b")]
        scope["path"] = "changed"
        scope["headers"].append((b"c", b"d"))
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message["body"], message["more_body"]
        self.bodies.append(body)
        listening = asyncio.create_task(receive())
        await asyncio.sleep(0)
        try:
            lost = len(self.bodies) <= self.losses
            if not lost or self.breaks:
                await send({"type": "http.response.start", "status": 200, "headers": self.headers})
            if self.part:
                await send({"type": "http.response.body", "body": self.part, "more_body": True})
            if not lost:
                await send({"type": "http.response.body", "body": b"fine", "more_body": False})
        finally:
            listening.cancel()


class Client:
    """Sends `parts` of a body and then leaves, or waits if it is `patient`."""

    def __init__(self, parts: list[bytes], patient: bool = True) -> None:
        self._parts, self._patient = list(parts), patient
        self.answer: list[Any] = []

    async def receive(self) -> Any:
        if self._parts:
            part = self._parts.pop(0)
            more = bool(self._parts) or not self._patient
            return {"type": "http.request", "body": part, "more_body": more}
        if self._patient:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.answer.append(message)


def exchange(
    serve: Serve, client: Client, method: str = "POST", path: str = "/x"
) -> tuple[int, bytes] | None:
    scope = {"type": "http", "method": method, "path": path, "headers": [(b"a", b"b")]}
    asyncio.run(LostRequestMiddleware(serve)(scope, client.receive, client.send))
    if not client.answer:
        return None
    return client.answer[0]["status"], b"".join(each["body"] for each in client.answer[1:])


@pytest.mark.parametrize("losses", [0, 1, 2])
@pytest.mark.parametrize("method", ["POST", "GET"])
def test_a_lost_request_is_sent_again_whole(losses: int, method: str) -> None:
    serve = Serve(losses)
    assert exchange(serve, Client(BODY), method) == (200, b"fine")
    assert serve.bodies == [b"{}"] * (losses + 1)


def test_a_request_that_is_lost_again_and_again_is_answered_503(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lost_requests._PAUSES_S[:2] == (0, 0), "the first try, and the second, need not wait"
    assert 25 < sum(lost_requests._PAUSES_S) < 60, "an ingress on a lost node is replaced after some time"
    monkeypatch.setattr(lost_requests, "_PAUSES_S", pauses := (0.0,) * len(lost_requests._PAUSES_S))
    serve, client = Serve(99), Client(BODY)
    answer = exchange(serve, client)
    assert answer and answer[0] == 503 and len(serve.bodies) == len(pauses)
    assert "was lost; send it again" in json.loads(answer[1])["error"]["message"]
    assert (b"retry-after", b"1") in client.answer[0]["headers"]


@pytest.mark.parametrize(
    ("parts", "method"),
    [([b"x" * MAX_KEPT_BYTES, b"x"], "POST"), ([b"x", b"x" * MAX_KEPT_BYTES], "POST"), (BODY, "DELETE")],
)
def test_a_request_that_cannot_be_repeated_is_answered_503(parts: list[bytes], method: str) -> None:
    serve = Serve(1)
    answer = exchange(serve, Client(parts), method)
    assert answer and answer[0] == 503 and len(serve.bodies) == 1


def test_an_answer_that_began_is_not_repeated() -> None:
    serve = Serve(1, breaks=True)
    assert exchange(serve, Client(BODY)) == (200, b"") and len(serve.bodies) == 1


STREAM = "text/event-stream; charset=utf-8"
LOST = "the process that had this request was lost; send it again"


@pytest.mark.parametrize(
    ("path", "lines"),
    [
        ("/a/v1/chat/completions", [b"event: error", b"data: {", b"", b"data: [DONE]", b"", b""]),
        ("/v1/messages", [b"event: error", b'data: {"type":"error"', b"", b""]),
        ("/v1/responses", [b"event: error", b'data: {"type":"error","sequence_number":5,', b"", b""]),
    ],
)
def test_a_stream_that_began_ends_with_an_error_event_of_its_api(path: str, lines: list[bytes]) -> None:
    begun = b'data: {"type":"a","sequence_number":4}'
    serve, client = Serve(1, breaks=True, part=begun + b"\n\n", kind=STREAM), Client(BODY)
    answer = exchange(serve, client, path=path)
    assert answer is not None and len(serve.bodies) == 1
    part, *told = answer[1].split(b"\n\n", 1)
    assert part == begun
    found = told[0].split(b"\n")
    assert all(line.startswith(start) for line, start in zip(found, lines, strict=True)), found
    assert LOST in found[1].decode()
    assert client.answer[-1]["more_body"] is False


def test_a_stream_that_ended_and_an_answer_in_one_piece_get_no_event() -> None:
    assert exchange(Serve(0, part=b"data: 1\n\n", kind=STREAM), Client(BODY)) == (200, b"data: 1\n\nfine")
    lost = Serve(1, breaks=True, part=b"{", kind="application/json")
    assert exchange(lost, Client(BODY)) == (200, b"{")


def test_a_client_that_left_gets_no_answer() -> None:
    serve = Serve(0)
    assert exchange(serve, Client(BODY, patient=False)) is None and not serve.bodies


def test_serve_wraps_it_first_so_that_a_repeated_request_counts_once_towards_the_limit() -> None:
    assert [each.cls for each in proxy.middlewares()] == [LostRequestMiddleware, proxy.OverloadMiddleware]


def test_with_haproxy_an_ingress_has_no_other_process_whose_requests_it_could_lose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serve, "get_replica_context", object)
    assert [each.cls for each in proxy.middlewares()] == [proxy.OverloadMiddleware]
