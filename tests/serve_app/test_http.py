"""HTTP around the ingress, without a server: keys, bodies and the form of refusals."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import Request, Response

from qwen3_dist.errors import RequestError
from serve_app.answers.messages import message_error
from serve_app.config import ServiceConfig, read_service_config
from serve_app.http import check_key, make_api, read_body


def request(path: str = "/v1/completions", body: bytes = b"", prefix: str = "", **headers: str) -> Request:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": prefix + path, "root_path": prefix, "headers": named}
    return Request(scope, receive)


def read(asked: Request) -> bytes:
    return asyncio.run(read_body(asked, 100))


@pytest.mark.parametrize(
    "headers", [{"authorization": "Bearer key"}, {"authorization": "bearer  key"}, {"x_api_key": "key"}]
)
def test_a_key_is_shown_as_openais_clients_do_or_as_anthropics_do(headers: dict[str, str]) -> None:
    check_key(request(**headers), "key")


@pytest.mark.parametrize(
    "headers", [{}, {"authorization": "Bearer ke"}, {"authorization": "key"}, {"x_api_key": "clé"}]
)
@pytest.mark.parametrize("prefix", ["", "/second"])
def test_a_missing_or_wrong_key_is_401(headers: dict[str, str], prefix: str) -> None:
    with pytest.raises(RequestError) as refused:
        check_key(request(prefix=prefix, **headers), "key")
    assert refused.value.status == 401
    assert "key" in str(refused.value)


def test_no_key_is_asked_for_where_none_is_set_nor_outside_the_apis() -> None:
    check_key(request(), "")
    check_key(request("/health"), "key")
    check_key(request("/health", prefix="/second"), "key")


def test_the_key_is_not_printed_with_the_settings() -> None:
    config = read_service_config({"api_key": "very secret"})
    assert config.api_key == "very secret"
    assert "very secret" not in repr(config)
    assert ServiceConfig().api_key == ""


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
            return await client.post(prefix + path)

    api = make_api({"/v1/messages": message_error})
    api.add_route(path, fail, methods=["POST"])
    answer = asyncio.run(ask())
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, kind)
    assert "secret" not in answer.text
