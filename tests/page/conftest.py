"""A headless Chromium, the system's own, and the fake service. Screenshots are kept in build/page."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.page.fake_service import FakeService

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[page]' brings it")
sync_api.expect.set_options(timeout=20_000)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SHOTS = Path(__file__).parents[2] / "build" / "page"
SIZES = {"wide": (1280, 800), "phone": (390, 844)}


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium; Debian's package is called chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def service() -> Iterator[FakeService]:
    with FakeService().serving() as service:
        yield service


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a URL in a browser of its own. The test fails if the page logs an error that it does not expect.

    Tests name their service first, so that it ends after the browser.
    """
    contexts, errors = [], []

    def open_url(
        url: str, size: str = "wide", scheme: str = "light", expected: str = "", **options: Any
    ) -> Any:
        width, height = SIZES[size]
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            has_touch=size == "phone",
            is_mobile=size == "phone",
            **options,
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: errors.append(str(error)))

        def hear(message: Any) -> None:
            if message.type == "error" and not (expected and expected in message.text):
                errors.append(message.text)

        page.on("console", hear)
        page.goto(url)
        return page

    yield open_url
    for context in contexts:
        context.close()
    assert not errors


@pytest.fixture
def keep() -> Callable[[Any, str], None]:
    """Keeps a screenshot."""
    SHOTS.mkdir(parents=True, exist_ok=True)

    def take(page: Any, name: str) -> None:
        page.screenshot(path=SHOTS / f"{name}.png", animations="disabled")

    return take
