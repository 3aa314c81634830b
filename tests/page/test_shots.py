"""Screenshots of both views, on a wide screen and a phone, light and dark, for people to look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.page.conftest import SIZES, sync_api
from tests.page.fake_service import FakeService
from tests.serve_app.support import wait_for

expect = sync_api.expect
POLLS, PERIOD_S = 45, 12  # nine minutes, of which the page is made to skip most


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_chat_fits_the_screen(
    service: FakeService, open_page: Any, keep: Callable[..., None], size: str, scheme: str
) -> None:
    page = open_page(service.url, size, scheme)
    keep(page, f"empty-{size}-{scheme}")
    for question in ("Why is the sky blue?", "What is the weather in Paris?"):
        page.fill("#question", question)
        page.keyboard.press("Enter")
        expect(page.locator("#send")).to_be_visible()
        expect(page.locator(".assistant").last.locator("footer")).to_be_visible()
        page.locator(".assistant").last.locator("summary").click()
        assert_fits(page)
        keep(page, f"chat-{question.split()[3]}-{size}-{scheme}".replace("?", ""))
    page.click("#open-settings")
    assert_fits(page)
    keep(page, f"settings-{size}-{scheme}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_cluster_fits_the_screen(
    service: FakeService, open_page: Any, keep: Callable[..., None], size: str, scheme: str
) -> None:
    service.period_s = PERIOD_S
    page = open_page("about:blank", size, scheme)
    page.clock.install()
    page.goto(f"{service.url}/#cluster")
    expect(page.locator("#experts")).to_be_visible()
    for poll in range(2, POLLS):
        page.clock.fast_forward(1000 * PERIOD_S)
        wait_for(lambda poll=poll: service.polls >= poll)
    expect(page.locator(".replica")).to_have_count(2)
    assert_fits(page)
    keep(page, f"cluster-{size}-{scheme}")
    page.locator("#heat").focus()
    page.keyboard.press("ArrowRight")
    page.locator("#heat").scroll_into_view_if_needed()
    keep(page, f"cluster-experts-{size}-{scheme}")


def assert_fits(page: Any) -> None:
    """Nothing is wider than the screen."""
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(
        "[...document.querySelectorAll('.view')].every((e) => e.scrollWidth <= e.clientWidth)"
    )
