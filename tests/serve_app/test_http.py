"""HTTP around the ingress, without a server: bodies and the form of refusals."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, Request, Response
from ray import serve

from qwen3_dist.errors import RequestError
from serve_app.ingress.admission import REFUSE_FOR_HEADER, OverloadedError, QueueFullError
from serve_app.ingress.http import error_headers, make_api, read_body
from serve_app.settings import ServiceConfig, read_service_config


def request(path: str = "/v1/completions", body: bytes = b"", prefix: str = "", **headers: str) -> Request:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": prefix + path, "root_path": prefix, "headers": named}
    return Request(scope, receive)


def read(asked: Request) -> bytes:
    return asyncio.run(read_body(asked, 100))


def test_a_refused_request_is_answered_before_its_body_is_read_in_the_form_of_its_api() -> None:
    def gate(_: Request) -> None:
        raise OverloadedError(64, retry_after_s=7)

    async def receive() -> dict[str, Any]:
        raise AssertionError("the body was read")

    async def ask(path: str) -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []

        async def send(message: Any) -> None:
            sent.append(message)

        await make_api(gate)({**request(path).scope}, receive, send)
        return sent

    for path, kind in (("/v1/completions", "invalid_request_error"), ("/v1/messages", "rate_limit_error")):
        start, body = asyncio.run(ask(path))
        assert start["status"] == 429 and (b"retry-after", b"7") in start["headers"]
        assert json.loads(body["body"])["error"]["type"] == kind


def test_a_full_queue_is_told_as_overload_and_proxies_pass_other_requests_on() -> None:
    assert error_headers(QueueFullError(5000, 7)) == {"retry-after": "7", REFUSE_FOR_HEADER: "0"}


def test_a_body_that_takes_too_long_is_408_and_its_connection_is_closed() -> None:
    async def dribble() -> dict[str, Any]:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b" ", "more_body": True}

    asked = Request(request().scope, dribble)
    with pytest.raises(RequestError) as refused:
        asyncio.run(read_body(asked, 10**6, timeout_s=0.05))
    assert refused.value.status == 408
    assert error_headers(refused.value) == {"x-should-retry": "false", "connection": "close"}


def test_the_key_is_not_printed_with_the_settings() -> None:
    config = read_service_config({"api_key": "very secret"})
    assert config.ingress.api_key == "very secret"
    assert "very secret" not in repr(config)
    assert ServiceConfig().ingress.api_key == ""


def test_a_body_is_json_unless_its_headers_say_otherwise() -> None:
    assert read(request(body=b"{}")) == b"{}"
    assert read(request(body=b"{}", content_type="application/json; charset=utf-8")) == b"{}"
    with pytest.raises(RequestError, match="content type must be application/json, not text/plain"):
        read(request(body=b"{}", content_type="text/plain"))


def test_a_body_over_the_limit_is_413() -> None:
    with pytest.raises(RequestError) as refused:
        read(request(body=b"x" * 101))
    assert refused.value.status == 413


@pytest.mark.parametrize("prefix", ["", "/second"])
@pytest.mark.parametrize(
    ("path", "kind"), [("/v1/completions", "server_error"), ("/v1/messages", "api_error")]
)
def test_an_unforeseen_error_has_the_form_of_its_api(path: str, kind: str, prefix: str) -> None:
    async def fail(_: Request) -> Response:
        raise KeyError("secret")

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(api, raise_app_exceptions=False, root_path=prefix)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(prefix + path, headers={"x-request-id": "id-of-it"})

    api = make_api(gate=lambda _: None)
    api.add_route(path, fail, methods=["POST"])
    answer = asyncio.run(ask())
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, kind)
    assert "secret" not in answer.text and "id-of-it" in answer.json()["error"]["message"]


def test_a_method_that_a_path_has_not_is_405_and_told_all_that_it_has() -> None:
    async def answer() -> Response:
        return Response()

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(api)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.put("/v1/thing/1")

    api, routes = make_api(gate=lambda _: None), APIRouter()
    routes.get("/v1/thing/{name}")(answer)
    api.delete("/v1/thing/{name}")(answer)
    api.include_router(routes)  # as Serve does with those of a deployment's class
    told = asyncio.run(ask())
    assert (told.status_code, told.headers["allow"]) == (405, "DELETE, GET")


def test_requests_that_go_directly_to_a_deployment_are_answered_as_those_of_other_routes_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    api = make_api(gate=lambda _: None)

    class Deployment:
        @api.post_directly("/v1/things", summary="a thing")
        async def things(self, request: Request) -> Response:
            if not await request.body():
                raise RequestError("the body is empty", param="input")
            if await request.body() == b"bug":
                raise ValueError("a bug")
            return Response(await request.body() + request.scope["route"].path.encode())

    monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(servable_object=Deployment()))

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(api, root_path="/second")
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            url = "/second/v1/things"
            return [
                await client.post(url, content=b"x"),
                await client.post(url),
                await client.get(url),
                await client.post(url + "/1"),
                await client.post(url, content=b"bug"),
            ]

    good, bad, other_method, unknown, bug = asyncio.run(ask())
    assert (bug.status_code, bug.json()["error"]["type"]) == (500, "server_error")
    assert (good.status_code, good.content) == (200, b"x/v1/things")
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "input")
    assert (other_method.status_code, other_method.headers["allow"]) == (405, "POST")
    assert unknown.status_code == 404
    assert list(api.openapi()["paths"]) == ["/v1/things"]
    assert api.openapi()["paths"]["/v1/things"]["post"]["summary"] == "a thing"
