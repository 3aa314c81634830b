"""What breaks first as load grows, in cases where it is plain."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cluster.planning.breaking_point import best_change, breaking_point
from cluster.planning.layout_loads import LayoutLoads
from cluster.planning.official import planned
from cluster.planning.planner import PlanRequest, plan
from qwen3_dist.layout import Layout
from tests.cluster.machines import DENSE, PLAIN, cluster
from tests.serve_app.command_line import printed

REQUEST = PlanRequest(100, 50, 1)
SMALL = cluster(device=replace(PLAIN.device, memory_bytes=4 * 10**6))
LOAD = ("--input-len", "1000", "--output-len", "500")


def loads(request: PlanRequest, where: object = PLAIN) -> LayoutLoads:
    return LayoutLoads(DENSE, Layout(), where, request)  # type: ignore[arg-type]


def test_a_small_cache_is_full_first() -> None:
    asked = loads(replace(REQUEST, input_len=10, output_len=1000, max_num_batched_tokens=64), SMALL)
    found = breaking_point(asked)
    assert found.limit == "kv_cache" and found.concurrency == asked.largest * 8
    assert found.requests_per_s == asked.requests_per_s(asked.largest)
    change = best_change(asked, found, [])
    assert change is not None and change.setting == "kv_cache_dtype=fp8"
    assert change.then.concurrency > 1.5 * found.concurrency  # half the bytes a token


def test_weights_that_leave_no_room_should_be_smaller() -> None:
    wide = replace(DENSE, hidden_dim=3000)  # 1.8 million weights: 11 sequences' caches in half of their bytes
    request = replace(REQUEST, input_len=10, output_len=200, max_num_batched_tokens=64)
    used = LayoutLoads(wide, Layout(), PLAIN, request).at(1).bytes_per_rank
    memory = used["weights"] + used["activations"] + 3 * 10**5
    tight = cluster(device=replace(PLAIN.device, memory_bytes=memory))
    asked = LayoutLoads(wide, Layout(), tight, request)
    change = best_change(asked, breaking_point(asked), [])
    assert asked.largest < 3 and change is not None and change.setting == "quantize=int8"
    assert change.then == breaking_point(LayoutLoads(planned(wide, "int8"), Layout(), tight, request))


def test_long_prompts_fill_the_steps_first() -> None:
    # Steps of 64 tokens are full of prompts once n * 100 = 50 * (64 - n): from n = 21.3 on.
    asked = loads(replace(REQUEST, max_num_batched_tokens=64))
    found = breaking_point(asked)
    assert asked.largest > 21 and found.limit == "step_tokens" and found.concurrency == 21 * 8
    larger = breaking_point(loads(replace(REQUEST, max_num_batched_tokens=128)))
    assert larger.limit == "step_tokens" and larger.concurrency == 42 * 8


@pytest.mark.parametrize("name", ["ttft", "itl"])
def test_a_limit_that_is_near_breaks_first(name: str) -> None:
    free = loads(REQUEST)
    value = getattr(free.at(5), f"{name}_ms")
    found = breaking_point(loads(replace(REQUEST, **{f"{name}_ms": value})))
    assert found.limit == name and free.at(5 + 1) and found.concurrency == 5 * 8
    assert getattr(free.at(6), f"{name}_ms") > value
    idle = breaking_point(loads(replace(REQUEST, **{f"{name}_ms": value / 1000})))
    assert (idle.limit, idle.concurrency, idle.requests_per_s) == (name, 0, 0.0)


def test_the_best_change_serves_most_of_all_that_are_tried() -> None:
    request = replace(REQUEST, input_len=10, output_len=1000, max_num_batched_tokens=64)
    asked = loads(request, SMALL)
    now = breaking_point(asked)
    others = plan(DENSE, SMALL, replace(request, concurrency=now.concurrency))
    change = best_change(asked, now, others)
    assert change is not None and change.then.requests_per_s > 1.05 * now.requests_per_s
    for one in others:
        if one.fits:
            other = breaking_point(LayoutLoads(DENSE, one.layout, SMALL, request))
            assert other.requests_per_s <= change.then.requests_per_s


def test_nothing_is_recommended_that_does_not_help() -> None:
    # One token a step and sequence, of weights alone: neither the cache nor the size of a step matters.
    asked = loads(replace(REQUEST, kv_cache_dtype="fp8", itl_ms=loads(REQUEST).at(1).itl_ms))
    now = breaking_point(asked)
    hopeless = replace(now, requests_per_s=1e9)
    assert best_change(asked, hopeless, []) is None


def test_the_plan_says_it_in_a_line_and_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("plan", "Qwen3-8B", "--gpus", "4xH100", *LOAD)
    first, *others = (
        json.loads(line) for line in printed(capsys, *asked, "--concurrency", "64", "--json").splitlines()
    )
    breaks = first["breaks_first"]
    assert breaks["limit"] in ("kv_cache", "step_tokens") and all(
        row["breaks_first"] is None for row in others
    )
    assert breaks["times_this_load"] == pytest.approx(breaks["concurrency"] / 64, rel=1e-2)
    (line,) = (
        line
        for line in printed(capsys, *asked, "--concurrency", "64").splitlines()
        if line.startswith("Breaks")
    )
    assert (
        f"{breaks['concurrency']:,} requests in flight" in line and breaks["best_change"]["setting"] in line
    )
    # Under a rate, the most that is served within the limits is where the first of them breaks.
    limit = str(1.5 * first["itl_ms"])
    rate = json.loads(printed(capsys, *asked, "--rate", "1", "--itl-ms", limit, "--json").splitlines()[0])
    assert rate["breaks_first"]["limit"] == "itl"
    assert rate["breaks_first"]["requests_per_s"] == pytest.approx(rate["most_requests_per_s"], rel=1e-3)
    assert rate["breaks_first"]["times_this_load"] == pytest.approx(rate["headroom"] + 1, rel=1e-2)
