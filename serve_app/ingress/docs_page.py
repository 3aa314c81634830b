"""`/docs` and `/redoc`. Their scripts come from this host, since clusters often have no internet access."""

from __future__ import annotations

from pathlib import Path

import fastapi_offline
from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles

_FILES = "/docs/files"


def add_docs(api: FastAPI) -> None:
    """Adds both pages, which show the application's openapi.json, and their static files."""

    async def swagger(request: Request) -> HTMLResponse:
        root = request.scope.get("root_path", "")
        return get_swagger_ui_html(
            openapi_url=f"{root}{api.openapi_url}",
            title=f"{api.title}: API",
            swagger_js_url=f"{root}{_FILES}/swagger-ui-bundle.js",
            swagger_css_url=f"{root}{_FILES}/swagger-ui.css",
            swagger_favicon_url=f"{root}{_FILES}/favicon.png",
        )

    async def redoc(request: Request) -> HTMLResponse:
        root = request.scope.get("root_path", "")
        return get_redoc_html(
            openapi_url=f"{root}{api.openapi_url}",
            title=f"{api.title}: API",
            redoc_js_url=f"{root}{_FILES}/redoc.standalone.js",
            redoc_favicon_url=f"{root}{_FILES}/favicon.png",
            with_google_fonts=False,
        )

    api.add_route("/docs", swagger, include_in_schema=False)
    api.add_route("/redoc", redoc, include_in_schema=False)
    files = Path(fastapi_offline.__file__).parent / "static"
    api.mount(_FILES, StaticFiles(directory=files), name="docs-files")
