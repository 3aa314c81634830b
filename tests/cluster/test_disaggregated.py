"""Prefill and decode on different replicas: sums that can be worked out by hand, and what a plan says of them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import pytest

from cluster.hardware import Cluster, Link, parse_gpus
from cluster.planning.cost_model import StepShape
from cluster.planning.disaggregated import DecodeReplica, PrefillReplica, best_split, cost_model, transfer_s
from cluster.planning.official import find_config
from cluster.planning.planner import PlanRequest
from qwen3_dist.errors import ConfigError
from qwen3_dist.layout import Layout
from tests.cluster.machines import DENSE, PLAIN, cluster
from tests.serve_app.command_line import printed, refusal

REQUEST = PlanRequest(100, 51, 1)
FAST = cluster(inside=Link(1e-6, 1e12), between=Link(1e-5, 1e12))


def decoder(request: PlanRequest = REQUEST, where: Cluster = FAST) -> DecodeReplica:
    return DecodeReplica(DENSE, Layout(), where, request)


def test_a_cache_moves_at_the_links_speed() -> None:
    assert transfer_s(8e4, Link(1e-6, 1e9, efficiency=0.5)) == pytest.approx(1e-6 + 160e-6)


def test_the_rank_with_most_of_the_cache_decides_how_long_it_takes() -> None:
    # 2 layers x K and V x 2 groups x 50 numbers x 2 bytes = 800 bytes a token on one rank, half of that with tp=2.
    one, two = (cost_model(DENSE, Layout(tp=tp), PLAIN, REQUEST).kv_bytes_per_token() for tp in (1, 2))
    assert (one, two) == (800, 400)
    found = best_split(DENSE, replace(PLAIN, num_devices=2), REQUEST)
    assert found is not None and (found.prefill, found.decode) == (Layout(), Layout())
    assert found.transfer_ms == pytest.approx(1e3 * (1e-6 + 800 * 100 / 1e9))


def test_tokens_between_transfers_are_steps_of_decodes_alone() -> None:
    step = cost_model(DENSE, Layout(), FAST, REQUEST).step_seconds(StepShape(4, int(4 * 125.5), 0, 0, 4))
    assert decoder().itl_s(4, 0.0) == step
    assert decoder().itl_s(4, 0.005) == pytest.approx(step + 0.005 / 50)
    # All of 4 sequences are done after 50 such steps.
    limit = replace(REQUEST, itl_ms=1e3 * step * 1.0001)
    rate, itl_s = decoder(limit).most(0.0)
    assert itl_s == step and rate == pytest.approx(4 / (50 * step))
    assert decoder(replace(REQUEST, itl_ms=1e-6)).most(0.0) == (0.0, 0.0)


def test_a_decoder_holds_what_its_cache_does() -> None:
    where = cluster(device=replace(PLAIN.device, memory_bytes=4 * 10**6))
    model = cost_model(DENSE, Layout(), where, REQUEST)
    most = decoder(where=where).largest
    assert model.kv_capacity_tokens(most, most) >= most * 151 and most > 1
    assert model.kv_capacity_tokens(most + 1, most + 1) < (most + 1) * 151
    assert DecodeReplica(DENSE, Layout(tp=4), replace(PLAIN, devices_per_node=2), REQUEST).largest == 0


def test_the_best_ratio_is_the_best_of_all_that_fit() -> None:
    request = replace(REQUEST, itl_ms=5.0, ttft_ms=100.0)
    where = replace(FAST, num_devices=4)
    found = best_split(DENSE, where, request)
    assert found is not None
    assert found.prefill_replicas * found.prefill.world + found.decode_replicas * found.decode.world <= 4
    assert found.itl_ms <= 5 and found.ttft_ms <= 100
    seconds = found.transfer_ms / 1e3
    for here, there in product((Layout(), Layout(tp=2), Layout(pp=2)), repeat=2):
        reads = PrefillReplica(DENSE, here, where, request).requests_per_s
        makes, _ = DecodeReplica(DENSE, there, where, request).most(seconds)
        for x in range(1, 4):
            y = (4 - x * here.world) // there.world
            assert min(x * reads, max(y, 0) * makes) <= 1.02 * found.requests_per_s


def test_longer_prompts_take_more_of_the_replicas_for_reading() -> None:
    where = replace(FAST, num_devices=8)
    shares = []
    for input_len, output_len in ((20, 400), (400, 20)):
        found = best_split(DENSE, where, replace(REQUEST, input_len=input_len, output_len=output_len))
        assert found is not None
        shares.append(found.prefill_replicas * found.prefill.world / 8)
    assert shares[0] < shares[1]


def test_a_dp_group_moves_one_cache_at_a_time() -> None:
    two = DecodeReplica(DENSE, Layout(dp=2), FAST, REQUEST)
    limit = replace(REQUEST, itl_ms=1e3 * two.itl_s(4, 0.0) * 1.0001)
    assert DecodeReplica(DENSE, Layout(dp=2), FAST, limit).most(0.0)[0] == pytest.approx(
        8 / (50 * two.itl_s(4, 0.0))
    )
    found = best_split(DENSE, cluster(num_devices=4, inside=Link(0.0, 1e6)), REQUEST)
    assert found is not None
    groups = (found.prefill_replicas * found.prefill.dp, found.decode_replicas * found.decode.dp)
    assert found.requests_per_s <= min(groups) / (found.transfer_ms / 1e3) * (1 + 1e-9)


def test_the_side_of_fewer_ranks_decides_how_long_a_transfer_takes() -> None:
    _, config = find_config("Qwen3-8B")
    where = parse_gpus("8xH100")
    request = PlanRequest(1000, 500, 1)
    idle = [DecodeReplica(config, Layout(tp=tp), where, request).itl_s(1, 0.0) for tp in (1, 4)]
    differ = False
    for share in (0.0, 0.5, 0.9):
        limit = 1e3 * ((1 - share) * 2 * idle[0] + share * idle[1])
        found = best_split(config, where, replace(request, itl_ms=limit))
        assert found is not None
        models = [cost_model(config, one, where, request) for one in (found.prefill, found.decode)]
        sides = [1000 * model.kv_bytes_per_token() for model in models]
        differ |= sides[0] != sides[1]
        assert found.transfer_ms == pytest.approx(1e3 * transfer_s(max(sides), where.inside))
    assert differ


def test_a_slow_link_bounds_what_is_served() -> None:
    where = cluster(num_devices=2, inside=Link(0.0, 1e5))
    found = best_split(DENSE, where, REQUEST)
    assert found is not None and found.requests_per_s <= 1 / 0.8 + 1e-9  # 80,000 bytes of a prompt take 0.8 s
    assert found.itl_ms > 800 / 50


def test_a_rate_is_served_by_the_fewest_devices() -> None:
    fixed = best_split(DENSE, replace(FAST, num_devices=4), REQUEST)
    assert fixed is not None
    sized = best_split(DENSE, FAST, REQUEST, rate=0.9 * fixed.requests_per_s)
    assert sized is not None and sized.requests_per_s >= 0.9 * fixed.requests_per_s and sized.num_devices <= 4
    many = best_split(DENSE, FAST, REQUEST, rate=20 * fixed.requests_per_s)
    assert many is not None and many.requests_per_s >= 20 * fixed.requests_per_s and many.num_devices % 4 == 0


def test_what_cannot_be_split_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    load = ("--gpus", "2xH100", "--input-len", "100", "--concurrency", "4", "--disaggregated")
    assert "raise --output-len to 2 or more" in refusal(capsys, "plan", *load, "--output-len", "1")
    with pytest.raises(ConfigError, match="all ranks share one host"):
        best_split(DENSE, cluster(num_devices=4, shared_host=True), REQUEST)
    assert best_split(DENSE, replace(PLAIN, num_devices=1), REQUEST) is None


def test_a_plan_marks_it_as_planned_only(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("plan", "Qwen3-8B", "--gpus", "8xH100", "--input-len", "4000", "--output-len", "200", "--rate", "4",
             "--ttft-ms", "2000", "--itl-ms", "40", "--disaggregated")  # fmt: skip
    text = printed(capsys, *asked)
    assert "(planned only: qwen3-dist cannot run this yet)" in text
    first, *others = map(json.loads, printed(capsys, *asked, "--json").splitlines())
    found = first["disaggregated"]
    assert found["can_run"] is False and all("disaggregated" not in row for row in others)
    assert found["itl_ms"] <= 40 and found["ttft_ms"] <= 2000
    _, config = find_config("Qwen3-8B")
    same = best_split(config, parse_gpus("8xH100"), PlanRequest(4000, 200, 1, ttft_ms=2000, itl_ms=40))
    assert same is not None and same.as_json().items() <= found.items()
    assert found["together"]["layout"] == first["layout"]
    assert found["together"]["most_requests_per_s"] == first["most_requests_per_s"]
    none = json.loads(printed(capsys, *asked[:2], "--gpus", "1xH100", *asked[4:], "--json").splitlines()[0])
    assert none["disaggregated"]["prefill"] is None
