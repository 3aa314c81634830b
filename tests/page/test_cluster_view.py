"""The cluster's view in a browser: figures, rates, experts, polling, and services that lack something."""

from __future__ import annotations

import re
from typing import Any

from tests.page.conftest import sync_api
from tests.page.fake_service import EXPERTS, LAYERS, FakeService
from tests.serve_app.support import wait_for

expect = sync_api.expect
REFUSED = "Failed to load resource"


def test_it_shows_replicas_ranks_and_rates(service: FakeService, open_page: Any) -> None:
    page = open_page(f"{service.url}/#cluster")
    expect(page.locator("#models h2")).to_have_text("Qwen3-30B-A3B")
    expect(page.locator("#models .badge").first).to_have_text("ready")
    expect(page.locator("#models .title .faint").first).to_have_text("2 of 1 to 3 replicas run")
    expect(page.locator(".replica h3")).to_have_text(["h8qw", "k3fz"])
    expect(page.locator("#tiles")).to_contain_text("of 1,256")
    replica = page.locator(".replica").first
    expect(replica.locator("[role=meter]").first).to_have_attribute(
        "aria-valuenow", re.compile(r"^[1-9]\d?$")
    )
    replica.locator("summary").click()
    expect(replica.locator("tbody tr")).to_have_count(4)
    expect(replica.locator("tbody tr").nth(1)).to_contain_text("NVIDIA H200")
    expect(replica.locator("tbody tr").nth(1)).to_contain_text("119.1 GiB")
    expect(page.locator(".chart b").first).to_have_text(re.compile(r"^\d"))
    polls = service.polls
    wait_for(lambda: service.polls > polls + 1)
    expect(replica.locator("tbody")).to_be_visible()  # what is unfolded stays so
    expect(page.locator(".line.s0").first).to_have_attribute("d", re.compile("L"))
    page.hover(".plot >> nth=0", position={"x": 5, "y": 20})
    expect(page.locator(".chart .ago")).to_contain_text("ago")


def test_counters_that_begin_anew_make_no_negative_rate(service: FakeService, open_page: Any) -> None:
    page = open_page(f"{service.url}/#cluster")
    service.polls = 1000
    wait_for(lambda: service.polls > 1002)
    service.polls = 0
    wait_for(lambda: service.polls > 3)
    expect(page.locator(".replica .facts").first).to_contain_text(re.compile(r"^\d"))
    assert "-" not in "".join(
        page.locator(".plot path").evaluate_all("(all) => all.map((p) => p.getAttribute('d'))")
    )


def test_experts_are_read_by_pointer_by_keyboard_and_as_a_table(service: FakeService, open_page: Any) -> None:
    page = open_page(f"{service.url}/#cluster")
    heat, value = page.locator("#heat"), page.locator("#heat-value")
    expect(heat).to_be_visible()
    heat.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    expect(value).to_contain_text("Layer 0, expert 5: 8,484 tokens")
    page.keyboard.press("ArrowDown")
    expect(value).to_contain_text("Layer 1, expert 5:")
    page.select_option("#experts-of", "replica 2")
    page.keyboard.press("Tab")
    heat.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    expect(value).to_contain_text("Layer 0, expert 5: 4,242 tokens")
    expect(value).to_contain_text("on ep rank 0")
    box = heat.bounding_box()
    heat.hover(position={"x": box["width"] - 2, "y": box["height"] - 2})
    expect(value).to_contain_text(f"Layer {LAYERS - 1}, expert {EXPERTS - 1}:")
    expect(value).to_contain_text("on ep rank 3")
    colours = heat.evaluate(
        "(c) => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
    )
    assert colours > 20
    page.locator("#experts summary").click()
    expect(page.locator("#heat-table tbody tr")).to_have_count(LAYERS)
    expect(page.locator("#heat-table tbody tr").first).to_contain_text("5")


def test_it_polls_only_while_it_is_seen(service: FakeService, open_page: Any) -> None:
    page = open_page("about:blank")
    page.clock.install()
    page.goto(service.url)
    expect(page.locator("#model option")).to_have_count(2)
    page.clock.run_for(20_000)
    assert service.polls == 0
    page.click("nav a >> nth=1")
    for polls in range(1, 4):
        wait_for(lambda polls=polls: service.polls >= polls)
        page.clock.run_for(2000)
    page.click("nav a >> nth=0")
    expect(page.locator("#cluster")).to_be_hidden()
    page.wait_for_load_state("networkidle")
    polls = service.polls
    page.clock.run_for(20_000)
    expect(page.locator("#question")).to_be_visible()
    assert service.polls == polls


def test_a_service_without_the_route_says_so_and_still_shows_experts(
    service: FakeService, open_page: Any
) -> None:
    service.cluster = "old"
    page = open_page(f"{service.url}/#cluster", expected=REFUSED)
    expect(page.locator("#cluster-note")).to_have_text("This service has no /v1/cluster.")
    expect(page.locator("#heat")).to_be_visible()
    service.cluster = "moe"
    expect(page.locator(".replica")).to_have_count(2)
    expect(page.locator("#cluster-note")).to_be_hidden()


def test_what_is_wrong_with_a_replica_is_told(service: FakeService, open_page: Any) -> None:
    service.cluster = "unhealthy"
    page = open_page(f"{service.url}/#cluster")
    expect(page.locator("#models section > .problem")).to_have_text("replica k3fz lost rank 2 on node-b")
    replica = page.locator(".replica").nth(1)
    expect(replica.locator(".badge")).to_have_text("unhealthy")
    expect(replica.locator(".problem")).to_have_text("rank 2 on node-b ended: CUDA error")
    expect(replica.locator(".meters")).to_contain_text("– run, – wait")


def test_a_dense_model_has_no_experts(service: FakeService, open_page: Any) -> None:
    service.cluster = "dense"
    page = open_page(f"{service.url}/#cluster")
    expect(page.locator(".replica")).to_have_count(1)
    expect(page.locator("#experts")).to_be_hidden()
