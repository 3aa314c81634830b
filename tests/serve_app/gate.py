"""What tests of the gate before the routes share: requests as Serve hands them over, and the gate itself."""

from __future__ import annotations

from typing import Any

from fastapi import Request

from qwen3_dist.errors import RequestError
from serve_app.ingress.access.control import Access
from serve_app.settings import IngressSettings


def request(path: str = "/v1/completions", method: str = "POST", prefix: str = "", **headers: str) -> Request:
    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {
        "type": "http",
        "method": method,
        "path": prefix + path,
        "root_path": prefix,
        "headers": named,
        "query_string": b"",
        "server": ("127.0.0.1", 8000),
    }
    return Request(scope)


def access(**settings: Any) -> Access:
    found = Access()
    found.configure(IngressSettings(**settings).with_hashes())
    return found


def status_of(found: Access, asked: Request) -> int:
    """The status that the gate refuses `asked` with; 200 if it does not."""
    try:
        found.check(asked)
    except RequestError as error:
        return error.status
    return 200
