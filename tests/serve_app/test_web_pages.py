"""Requests that browsers send for web pages, without a server: CORS, other sites, names rebound to loopback."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fastapi import Request, Response

from qwen3_dist.errors import ConfigError
from serve_app.ingress.access.control import Access
from serve_app.ingress.http import make_api
from serve_app.settings import IngressSettings
from tests.serve_app.gate import access, request, status_of

REBALANCE = "/v1/cluster/experts/rebalance"
PAGE = "https://page.example"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # no browser
        ({"sec_fetch_site": "same-origin", "origin": "http://localhost:8000"}, 200),
        ({"sec_fetch_site": "none"}, 200),
        ({"sec_fetch_site": "cross-site", "origin": PAGE}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "same-site", "origin": "http://localhost:3000"}, 403),
        ({"origin": PAGE}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost:8000"}, 200),
        ({"origin": "http://localhost:3000"}, 403),
    ],
)
def test_a_page_of_another_site_cannot_post_to_a_service_without_keys(
    headers: dict[str, str], status: int
) -> None:
    for path in ("/v1/completions", REBALANCE):
        assert status_of(access(), request(path, host="localhost:8000", **headers)) == status
    shown = {"x_api_key": "key", **headers}
    assert status_of(access(api_key="key"), request(host="localhost:8000", **shown)) == 200


def test_a_page_may_be_allowed() -> None:
    found = access(cors_allow_origins=f"http://localhost:3000, {PAGE}/")
    for origin, status in ((PAGE, 200), ("http://localhost:3000", 200), ("https://other.example", 403)):
        assert status_of(found, request(origin=origin, sec_fetch_site="cross-site")) == status
    assert status_of(access(cors_allow_origins="*"), request(origin=PAGE)) == 200
    with pytest.raises(ConfigError, match="cors_allow_origins must be"):
        IngressSettings(cors_allow_origins="page.example")


@pytest.mark.parametrize(
    ("host", "allowed", "status"),
    [
        ("127.0.0.1:8000", "", 200),
        ("[::1]:8000", "", 200),
        ("localhost:8000", "", 200),
        ("rebound.example:8000", "", 403),
        ("gpu-box:8000", "GPU-box", 200),
        ("rebound.example", "*", 200),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_name_that_was_rebound_to_loopback_is_refused(
    host: str, allowed: str, status: int, method: str
) -> None:
    own = {"sec_fetch_site": "same-origin", "origin": f"http://{host}", "host": host}
    assert status_of(access(allowed_hosts=allowed), request("/v1/models", method, **own)) == status
    elsewhere = request("/v1/models", method, **own)
    elsewhere.scope["server"] = ("10.0.0.5", 8000)
    assert status_of(access(), elsewhere) == 200
    assert status_of(access(api_key="key"), request("/v1/models", method, x_api_key="key", **own)) == 200


def answer_of(found: Access, asked: Request) -> tuple[int, dict[str, str]]:
    """Status and headers of what an application with the gate of `found` answers."""

    async def ask() -> list[Any]:
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        api = make_api(found.check)
        api.add_route("/v1/completions", lambda _: Response("done"), methods=["POST"])
        await api(asked.scope, receive, send)
        return sent

    start = asyncio.run(ask())[0]
    return start["status"], {name.decode(): value.decode() for name, value in start["headers"]}


def test_an_allowed_page_may_ask_without_a_key_what_it_may_send_and_may_read_answers_and_errors() -> None:
    found = access(api_key="key", cors_allow_origins=PAGE)
    wish = {"access_control_request_method": "POST", "access_control_request_headers": "authorization"}
    status, headers = answer_of(found, request(method="OPTIONS", origin=PAGE, **wish))
    assert (status, headers["access-control-allow-origin"]) == (204, PAGE)
    assert headers["access-control-allow-headers"] == "authorization"
    assert "POST" in headers["access-control-allow-methods"]
    for shown, expected in (("key", 200), ("wrong", 401)):
        status, headers = answer_of(found, request(origin=PAGE, x_api_key=shown))
        assert (status, headers["access-control-allow-origin"], headers["vary"]) == (expected, PAGE, "Origin")


def test_other_pages_are_told_nothing() -> None:
    wish = {"access_control_request_method": "POST"}
    for found in (access(api_key="key", cors_allow_origins=PAGE), access()):
        for asked in (
            request(method="OPTIONS", origin="https://other.example", **wish),
            request(origin="null"),
        ):
            status, headers = answer_of(found, asked)
            assert status in (401, 403, 405)
            assert not [name for name in headers if name.startswith("access-control")]
