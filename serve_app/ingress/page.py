"""`/`: the built-in page, a chat with the service and a view of its cluster. Its files lie in `serve_app/page/`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from pathlib import Path

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

FOLDER = Path(__file__).parent.parent / "page"
_INDEX = "index.html"
_PREFIX = "/page/"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing from another host, no inline script or style, no HTML from strings, no frame around the page.
_POLICY = (
    "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)
_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": _POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True)
class _File:
    body: bytes
    media_type: str
    etag: str


def add_page(api: FastAPI) -> None:
    """Adds `/`, and `/page/` with the files that it loads."""
    api.add_route("/", _index, include_in_schema=False)
    api.add_route(f"{_PREFIX}{{name}}", _file, include_in_schema=False)


def is_page(path: str) -> bool:
    """Whether `path`, without the prefix of the application, is of the page, whose files hold no secret."""
    return path in ("", "/") or path.startswith(_PREFIX)


async def _index(request: Request) -> Response:
    return _answer(request, _INDEX)


async def _file(request: Request) -> Response:
    return _answer(request, request.path_params["name"])


def _answer(request: Request, name: str) -> Response:
    """The file called `name`, or 304 if the client has it. Raises HTTPException (404) if there is none."""
    file = _files().get(name)
    if file is None:
        raise HTTPException(HTTPStatus.NOT_FOUND, "the page has no such file")
    headers = {**_HEADERS, "etag": file.etag}
    known = request.headers.get("if-none-match", "")
    if file.etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    return Response(file.body, headers=headers, media_type=file.media_type)


@cache
def _files() -> dict[str, _File]:
    """The page's files by name. No other path can be asked for, since requests are looked up here alone."""
    files = {}
    for path in FOLDER.iterdir():
        if path.suffix in _TYPES:
            body = path.read_bytes()
            etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
            files[path.name] = _File(body, _TYPES[path.suffix], etag)
    return files
