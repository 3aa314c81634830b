"""A request's id and its log line, around an ingress's application without a server."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import Request, Response

from qwen3_dist.errors import RequestError
from serve_app.apis.shared.answer import Counted
from serve_app.ingress.access_log import access_record
from serve_app.ingress.http import Api, make_api
from serve_app.telemetry.formats import formatter
from serve_app.telemetry.summary import RequestSummary

FIELDS = [
    "time",
    "level",
    "logger",
    "process",
    "message",
    "request_id",
    "method",
    "path",
    "status",
    "key",
    "model",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "queue_ms",
    "ttft_ms",
    "finish_reasons",
    "replica",
    "resumed",
    "e2e_ms",
    "client",
    "client_gone",
    "error_status",
]
SUMMARY = RequestSummary("r1", "m", 7, 3, 4, 0.001, 0.002, 0.004, 0.01, 0.011, ("stop", "length"))


class Lines(logging.Handler):
    """Keeps the records of the access log."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def only(self) -> dict[str, Any]:
        [record] = self.records
        fields: dict[str, Any] = json.loads(formatter("json", "Ingress#1").format(record))
        return fields

    def text(self) -> str:
        return formatter("text", "Ingress#1").format(self.records[-1])


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler = Lines()
    log = logging.getLogger("qwen3_dist.access")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield handler
    log.removeHandler(handler)
    log.setLevel(level)


@pytest.fixture
def api() -> Api:
    def gate(request: Request) -> None:
        access_record(request.scope).key_name = "alice"
        if "refuse" in request.headers:
            raise RequestError("no", status=429)

    api = make_api(gate)

    @api.post("/ok")
    async def ok(request: Request) -> Response:
        access_record(request.scope).end_with(SUMMARY)
        return Response("ok")

    @api.post("/bug")
    async def bug() -> Response:
        raise TypeError("secret")

    @api.get("/health")
    async def health() -> Response:
        return Response("ok")

    return api


def send(api: Api, method: str, path: str, **headers: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(
                method, path, headers={name.replace("_", "-"): value for name, value in headers.items()}
            )

    return asyncio.run(ask())


def test_the_line_has_the_same_keys_whatever_happened(api: Api, lines: Lines) -> None:
    send(api, "POST", "/ok", x_request_id="abc")
    told = lines.only()
    assert list(told) == FIELDS
    assert (
        told
        | {
            "request_id": "abc",
            "key": "alice",
            "status": 200,
            "model": "m",
            "prompt_tokens": 7,
            "completion_tokens": 3,
            "cached_tokens": 4,
            "queue_ms": 1.0,
            "ttft_ms": 4.0,
            "finish_reasons": ["stop", "length"],
            "replica": "r1",
            "resumed": None,
            "client_gone": False,
            "error_status": None,
        }
        == told
    )
    lines.records.clear()
    send(api, "POST", "/ok", refuse="yes")
    assert list(lines.only()) == FIELDS and lines.only()["status"] == 429


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [("/ok", {}, 200), ("/ok", {"refuse": "yes"}, 429), ("/bug", {}, 500), ("/none", {}, 404)],
)
def test_every_answer_has_the_id_that_its_line_and_its_error_name(
    api: Api, lines: Lines, path: str, headers: dict[str, str], status: int
) -> None:
    answer = send(api, "POST", path, x_request_id="my id", **headers)
    assert (answer.status_code, answer.headers.get_list("x-request-id")) == (status, ["my id"])
    assert (lines.only()["request_id"], lines.only()["status"]) == ("my id", status)
    if status == 500:
        assert "request my id" in answer.json()["error"]["message"]
    made = send(api, "POST", path, **headers).headers["x-request-id"]
    assert len(made) == 36 and made != send(api, "POST", path, **headers).headers["x-request-id"]


@pytest.mark.parametrize(("sent", "kept"), [("x" * 200, "x" * 128), ("a\tb\x7fc", "a?b?c"), ("é", "??")])
def test_an_id_is_short_and_printable(api: Api, lines: Lines, sent: str, kept: str) -> None:
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/",
        "headers": [(b"x-request-id", sent.encode())],
    }
    assert access_record(scope).request_id == kept


def test_nobody_forges_a_line_by_a_path_or_an_id(api: Api, lines: Lines) -> None:
    send(api, "POST", "/x%0A2026 status=200", x_request_id='a" status=200')
    text = lines.text()
    assert "\n" not in text and text.count(" status=") == 3
    assert 'path="/x\\n2026 status=200"' in text and 'request_id="a\\" status=200"' in text


def test_probes_have_no_line_unless_debug_is_asked_for(api: Api, lines: Lines) -> None:
    send(api, "GET", "/health")
    assert not lines.records
    logging.getLogger("qwen3_dist.access").setLevel(logging.DEBUG)
    send(api, "GET", "/health")
    assert lines.only()["path"] == "/health"


def test_a_client_that_leaves_before_the_end_is_said_to(api: Api, lines: Lines) -> None:
    @api.post("/slow")
    async def slow() -> Response:
        await asyncio.Event().wait()
        return Response()

    async def leave() -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b""}

        async def send_nowhere(message: Any) -> None: ...

        scope = {"type": "http", "method": "POST", "path": "/slow", "query_string": b"", "headers": []}
        task = asyncio.create_task(api(scope, receive, send_nowhere))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(leave())
    assert (lines.only()["status"], lines.only()["client_gone"]) == (499, True)


@pytest.mark.parametrize(("error_status", "reason"), [(None, "abort"), (408, "abort"), (503, "error")])
def test_a_line_without_a_summary_has_what_was_counted_until_then(
    error_status: int | None, reason: str
) -> None:
    record = access_record({"type": "http", "method": "POST", "path": "/", "headers": []})
    record.error_status = error_status
    assert record.fields()["finish_reasons"] == ()
    for tokens in (0, 9):
        record.count(Counted(b"part", tokens, 7, 4))
    told = record.fields()
    assert [told[f"{kind}_tokens"] for kind in ("prompt", "completion", "cached")] == [7, 2, 4]
    assert told["finish_reasons"] == (reason,)
    record.end_with(SUMMARY)
    assert record.fields()["finish_reasons"] == ("stop", "length")


def test_a_line_says_how_often_a_request_was_resumed_and_when_its_first_token_came() -> None:
    record = access_record({"type": "http", "method": "POST", "path": "/", "headers": []})
    record.started_s -= 2.0
    record.count(Counted(b"part", 8, 7, sent=((0, (5,), None, 0, ()),)))
    assert record.fields()["resumed"] is None
    record.resume()
    record.resume()
    record.end_with(replace(SUMMARY, first_token_s=None))
    told = record.fields()
    assert told["resumed"] == 2 and 2000 <= told["ttft_ms"] <= told["e2e_ms"]
    line = logging.LogRecord("log", logging.INFO, "f", 1, "request", None, None)
    line.fields = told
    assert " resumed=2 " in formatter("text", "p").format(line)
    assert json.loads(formatter("json", "p").format(line))["resumed"] == 2


def test_a_bugs_traceback_lies_in_the_file_that_the_answer_names(
    api: Api, lines: Lines, tmp_path: Path
) -> None:
    file = logging.FileHandler(tmp_path / "ingress.log")
    logging.getLogger("ray.serve").addHandler(file)
    try:
        message = send(api, "POST", "/bug", x_request_id="id-9").json()["error"]["message"]
    finally:
        logging.getLogger("ray.serve").removeHandler(file)
        file.close()
    assert "ingress.log" in message and "secret" not in message
    logged = (tmp_path / "ingress.log").read_text()
    assert "request id-9 failed" in logged and "TypeError: secret" in logged


def test_a_traceback_follows_its_line_in_text_and_stays_inside_it_in_json() -> None:
    try:
        raise TypeError("secret")
    except TypeError as error:
        record = logging.LogRecord("log", logging.ERROR, "f", 1, "bad", None, (type(error), error, None))
    text = formatter("text", "p").format(record)
    assert text.splitlines()[0].endswith("ERROR log p bad") and "TypeError: secret" in text
    line = formatter("json", "p").format(record)
    assert "\n" not in line and "TypeError: secret" in json.loads(line)["traceback"]
