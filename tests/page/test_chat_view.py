"""The chat in a browser: streams, thoughts, tool calls, stops, errors, hostile answers, settings, keys, keyboard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.page.conftest import sync_api
from tests.page.fake_service import KEY, FakeService
from tests.page.scripts import ATTACKS
from tests.serve_app.support import wait_for

expect = sync_api.expect
REFUSED = "Failed to load resource"  # what a browser logs of an answer with an error status
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]


def ask(page: Any, question: str) -> Any:
    """Asks and returns the answer's element without waiting for its end."""
    page.fill("#question", question)
    page.keyboard.press("Enter")
    return page.locator(".assistant").last


def done(page: Any) -> None:
    expect(page.locator("#send")).to_be_visible()


def set_up(page: Any, **fields: str) -> None:
    page.click("#open-settings")
    for name, value in fields.items():
        page.fill(f"#settings [name={name}]", value)
    page.click("#settings button[type=submit]")


def test_an_answer_streams_with_folded_thoughts_and_its_markdown(
    service: FakeService, open_page: Any
) -> None:
    page = open_page(service.url)
    page.select_option("#model", "sailor")
    answer = ask(page, "Why is the sky blue?")
    done(page)
    expect(answer.locator("summary")).to_contain_text("Thought for")
    expect(answer.locator(".thoughts")).to_be_hidden()
    answer.locator("summary").click()
    expect(answer.locator(".thoughts")).to_contain_text("Rayleigh's law")
    text = answer.locator(".text")
    expect(text.locator("h4")).to_have_text("Why the sky is blue")
    expect(text.locator("strong")).to_have_text("all colours")
    expect(text.locator("em")).to_have_text("short")
    expect(text.locator("p code")).to_have_text("1 / wavelength⁴")
    expect(text.locator("ol > li")).to_have_count(2)
    expect(text.locator("ol > li ul > li")).to_have_count(2)
    expect(text.locator("tbody tr").nth(1).locator("td").nth(1)).to_have_text("650 nm")
    expect(text.locator("pre")).to_contain_text("def scattered(wavelength_nm: float) -> float:\n    return")
    expect(text.locator("p").last).to_contain_text("So the sky takes")
    expect(answer.locator(".facts")).to_contain_text("first token after")
    expect(answer.locator(".facts")).to_contain_text("tokens/s")
    assert service.asked[0] == {
        "model": "sailor",
        "messages": [{"role": "user", "content": "Why is the sky blue?"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    ask(page, "And then?")
    done(page)
    roles = [message["role"] for message in service.asked[1]["messages"]]
    assert roles == ["user", "assistant", "user"]


def test_thoughts_are_announced_while_they_last(service: FakeService, open_page: Any) -> None:
    page = open_page(service.url)
    answer = ask(page, "think long")
    expect(answer.locator("summary")).to_have_text("Thinking…")
    expect(answer).to_have_attribute("aria-busy", "true")
    page.click("#stop")
    expect(answer).to_have_attribute("aria-busy", "false")


def test_a_tool_call_is_shown_and_its_result_can_be_given(service: FakeService, open_page: Any) -> None:
    page = open_page(service.url)
    set_up(page, tools=json.dumps(TOOLS))
    answer = ask(page, "What is the weather in Paris?")
    expect(answer.locator(".call strong")).to_have_text("get_weather")
    expect(answer.locator(".call code")).to_have_text('{\n  "city": "Paris",\n  "days": 2\n}')
    answer.locator(".results textarea").fill("sunny")
    answer.get_by_role("button", name="Send the result").click()
    expect(page.locator(".assistant").last.locator("strong")).to_have_text("sunny")
    assert [asked["tools"] for asked in service.asked] == [TOOLS, TOOLS]
    call = {"name": "get_weather", "arguments": '{"city": "Paris", "days": 2}'}
    assert service.asked[1]["messages"][1:] == [
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "I need the tool.",
            "tool_calls": [{"id": "call-1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "call-1", "content": "sunny"},
    ]
    expect(page.locator(".results")).to_have_count(0)


@pytest.mark.parametrize("how", ["button", "escape", "clear"])
def test_an_answer_is_stopped_and_the_service_hears_of_it(
    service: FakeService, open_page: Any, how: str
) -> None:
    page = open_page(service.url)
    answer = ask(page, "slow please")
    expect(answer.locator(".text")).to_contain_text("one more")
    expect(page.locator("#send")).to_be_hidden()
    if how == "escape":
        page.keyboard.press("Escape")
    else:
        page.click("#stop" if how == "button" else "#clear")
    done(page)
    wait_for(service.hung_up.is_set)
    if how == "clear":
        expect(page.locator(".turn")).to_have_count(0)
        expect(page.locator("#empty")).to_be_visible()
        return
    expect(answer.locator(".facts")).to_contain_text("stopped")
    expect(answer.locator(".text")).to_contain_text("one more")
    expect(answer.locator(".problem")).to_be_hidden()


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("break", "the engine died; ask again"),
        ("hang up", "The connection ended before the answer did."),
        ("refuse", "temperature must be at most 2, not 9"),
    ],
)
def test_errors_are_told_in_words_and_what_came_before_stays(
    service: FakeService, open_page: Any, question: str, words: str
) -> None:
    page = open_page(service.url, expected=REFUSED)
    answer = ask(page, question)
    done(page)
    expect(answer.locator(".problem")).to_have_text(words)
    if question == "break":
        expect(answer.locator(".text")).to_have_text("The answer begins")
    ask(page, "And now?")
    done(page)
    expect(page.locator(".assistant").last).to_contain_text("How can I help you?")
    if question == "refuse":  # no empty answer is sent
        assert [message["role"] for message in service.asked[1]["messages"]] == ["user", "user"]


def test_a_service_that_is_gone_is_told(service: FakeService, open_page: Any) -> None:
    page = open_page(service.url, expected=REFUSED)
    page.context.set_offline(True)
    answer = ask(page, "Hello?")
    expect(answer.locator(".problem")).to_have_text("The service cannot be reached.")
    page.context.set_offline(False)
    answer.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".assistant .text")).to_have_text("Hello! How can I help you?")


def test_hostile_answers_stay_text(service: FakeService, open_page: Any) -> None:
    page = open_page(service.url)
    answer = ask(page, "attack")
    done(page)
    answer.locator("summary").click()
    assert page.evaluate("window.hacked") is None
    made = answer.locator("script, img, svg, iframe, style, a, link, object, [onerror], [onload], [href]")
    expect(made).to_have_count(0)
    expect(answer.locator(".text strong")).to_have_text('<svg onload="window.hacked = 3">')
    expect(answer.locator(".text")).to_contain_text("[click](javascript:window.hacked=5)")
    expect(answer.locator(".thoughts")).to_have_text(ATTACKS.strip())
    expect(page.locator("#log")).to_be_visible()
    page.reload()
    expect(page.locator(".assistant .text strong")).to_have_text('<svg onload="window.hacked = 3">')
    assert page.evaluate("window.hacked") is None


def test_settings_are_sent_and_outlive_the_page_but_the_key_only_if_asked(
    service: FakeService, open_page: Any
) -> None:
    page = open_page(service.url)
    page.click("#open-settings")
    page.fill("[name=temperature]", "0")
    page.press("[name=temperature]", "Escape")
    expect(page.locator("#settings")).to_be_hidden()
    page.click("#open-settings")
    assert page.input_value("[name=temperature]") == ""
    for name, value in {
        "key": KEY,
        "system": "Be short.",
        "temperature": "0.5",
        "topP": "0.9",
        "maxTokens": "20",
    }.items():
        page.fill(f"[name={name}]", value)
    page.select_option("[name=thinking]", "off")
    page.fill("[name=tools]", "[{]")
    page.click("#settings button[type=submit]")
    expect(page.locator("#settings-error")).to_contain_text("Tools are not JSON")
    page.fill("[name=tools]", "")
    page.click("#settings button[type=submit]")
    expect(page.locator("#settings")).to_be_hidden()
    stored = "JSON.stringify({...localStorage})"
    assert KEY not in page.evaluate(stored)
    page.reload()
    ask(page, "Hello")
    done(page)
    assert service.asked[0]["messages"][0] == {"role": "system", "content": "Be short."}
    fields = ("temperature", "top_p", "max_completion_tokens", "chat_template_kwargs")
    assert [service.asked[0][field] for field in fields] == [0.5, 0.9, 20, {"enable_thinking": False}]
    page.click("#open-settings")
    assert page.input_value("[name=key]") == KEY
    page.check("[name=keepKey]")
    page.click("#settings button[type=submit]")
    assert KEY in page.evaluate(stored)


def test_a_service_with_a_key_asks_for_it_at_once(service: FakeService, open_page: Any) -> None:
    service.key = KEY
    page = open_page(service.url, expected=REFUSED)
    expect(page.locator("#settings")).to_be_visible()
    expect(page.locator("#model")).to_be_disabled()
    page.fill("[name=key]", KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_be_enabled()
    expect(ask(page, "Hello").locator(".text")).to_have_text("Hello! How can I help you?")


def test_it_works_by_keyboard(service: FakeService, open_page: Any) -> None:
    page = open_page(service.url)
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("you")
    assert service.asked == []
    page.keyboard.press("Enter")
    done(page)
    assert service.asked[0]["messages"][0]["content"] == "Hello\nyou"
    expect(page.locator("#question")).to_be_focused()
    reached = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert {"Chat", "Cluster", "model", "open-settings", "Copy", "Regenerate", "send", "clear"} <= reached
    page.locator("nav a").nth(1).focus()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Enter")
    expect(page.locator("#cluster")).to_be_visible()
    expect(page.locator("#chat")).to_be_hidden()


def test_regenerate_asks_again_and_copy_copies(service: FakeService, open_page: Any) -> None:
    page = open_page(service.url, permissions=["clipboard-read", "clipboard-write"])
    answer = ask(page, "Hello")
    done(page)
    answer.get_by_role("button", name="Copy").click()
    expect(answer.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "Hello! How can I help you?"
    answer.get_by_role("button", name="Regenerate").click()
    wait_for(lambda: len(service.asked) == 2)
    done(page)
    assert service.asked[0] == service.asked[1]
    expect(page.locator(".turn")).to_have_count(2)


@pytest.fixture
def below_prefix() -> Iterator[FakeService]:
    with FakeService("/small").serving() as service:
        yield service


def test_it_works_below_a_prefix(open_page: Any, below_prefix: FakeService) -> None:
    page = open_page(below_prefix.url)
    expect(ask(page, "Hello").locator(".text")).to_have_text("Hello! How can I help you?")


def test_it_fits_the_narrowest_phone(service: FakeService, open_page: Any) -> None:
    page = open_page(service.url, "phone")
    page.set_viewport_size({"width": 360, "height": 640})
    ask(page, "Why is the sky blue?")
    done(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("#log").evaluate("(log) => log.scrollWidth <= log.clientWidth")
