"""The page of the real service with the bundled model, which thinks and calls tools."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from serve_app.launch.foreground import running_service
from serve_app.settings import BUNDLED_NAME, read_service_config
from tests.page.conftest import sync_api
from tests.serve_app.support import SETTINGS, free_port

expect = sync_api.expect
WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    config = read_service_config(
        {**SETTINGS, "port": free_port(), "api_key": "sesame", "route_prefix": "/small"}
    )
    with running_service(config) as service:
        yield service.url


def test_the_bundled_model_is_asked_and_its_experts_are_shown(
    url: str, open_page: Callable[..., Any], keep: Callable[..., None]
) -> None:
    page = open_page(url, expected="Failed to load resource")
    page.fill("[name=key]", "sesame")
    page.fill("[name=tools]", json.dumps([{"type": "function", "function": WEATHER}]))
    page.fill("[name=temperature]", "0")
    page.click("#settings button[type=submit]")
    expect(page.locator("#model")).to_have_value(BUNDLED_NAME)
    page.fill("#question", "What is the weather in Paris?")
    page.keyboard.press("Enter")
    expect(page.locator(".call strong")).to_have_text("get_weather")
    expect(page.locator(".call code")).to_contain_text("Paris")
    page.fill(".results textarea", "sunny, 21 degrees")
    page.click(".results button")
    expect(page.locator(".assistant")).to_have_count(2)
    expect(page.locator(".assistant .facts").last).to_contain_text(" tokens")  # no rate if all come at once
    page.click("#clear")
    page.fill("#question", "What is 2 + 3?")
    page.keyboard.press("Enter")
    expect(page.locator(".assistant .facts")).to_contain_text(" tokens")
    keep(page, "real-chat")
    page.click("nav a >> nth=1")
    expect(page.locator("#heat")).to_be_visible()
    expect(page.locator("#models .title .faint").first).to_have_text("1 of 1 to 2 replicas run")
    page.locator("#heat").focus()
    expect(page.locator("#heat-value")).to_contain_text(re.compile(r"Layer \d+, expert 0: [\d,]+ tokens"))
    keep(page, "real-cluster")
