"""`qwen3-dist explain` as a user has it: where a step's time goes, and what would make it faster."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest

from cluster.hardware import Link, parse_gpus
from cluster.planning.cost_model import CostModel, StepShape
from cluster.planning.dp_groups import GroupShapes
from cluster.planning.explain import (
    ACTIVATIONS,
    KV,
    OVERHEADS,
    PRODUCTS,
    WAITS,
    WEIGHTS,
    ExplainedStep,
    explain_steps,
    step_shares,
)
from cluster.planning.layout_loads import LayoutLoads
from cluster.planning.next_change import next_changes
from cluster.planning.official import find_config
from cluster.planning.planner import PlanRequest, plan, predict
from qwen3_dist.layout import Layout
from serve_app.cli import main
from tests.cluster.machines import DENSE, MOE, PLAIN, cluster

REQUEST = PlanRequest(100, 50, 8, max_num_batched_tokens=64)
LOAD = ("--input-len", "1000", "--output-len", "1000", "--concurrency", "256")
FAST = Link(0.0, 1e15)


def explained(config: Any, machine: Any, layout: str, request: PlanRequest = REQUEST) -> list[ExplainedStep]:
    one = predict(config, Layout.parse(layout), machine, request)
    return list(explain_steps(config, machine, request, one))


@pytest.mark.parametrize("layout", ["tp=1", "tp=2", "tp=2,dp=2", "dp=2,pp=2", "tp=2,dp=4,ep=8", "dp=4,ep=2"])
def test_shares_of_a_step_add_up_to_it(layout: str) -> None:
    config = MOE if "ep" in layout else DENSE
    config = replace(config, num_experts=8) if "ep" in layout else config
    overheads = {"step_overhead_s": 1e-3, "layer_overhead_s": 1e-4, "sequence_overhead_s": 1e-5}
    machine = cluster(**overheads, inside=Link(1e-6, 1e9, all_to_all=Link(2e-6, 5e8)))
    model = CostModel(config, Layout.parse(layout), machine, REQUEST.expert_imbalance)
    for shape, mean in (
        (StepShape(8, 900, 0, 0, 8), StepShape(8, 900, 0, 0, 8)),
        (StepShape(7, 800, 57, 2000, 8), StepShape(7, 800, 20, 700, 8)),
    ):
        shapes = GroupShapes(shape, mean)
        shares = list(step_shares(config, model.layout, machine, REQUEST, shapes))
        saved_s = shapes.shared_seconds(model)
        assert (saved_s > 0) == (bool(config.num_experts) and shape != mean)
        assert sum(share.seconds for share in shares) == pytest.approx(model.step_seconds(shape) - saved_s)
        assert all(share.seconds > 0 for share in shares if share.term != WAITS)


@pytest.mark.parametrize(
    ("name", "layout", "request_", "rate"),
    [
        ("Qwen3-8B", "tp=1", PlanRequest(4000, 100, 16), None),
        ("Qwen3-8B", "tp=2,dp=2", PlanRequest(1000, 500, 64, drafted=3, acceptance=0.5), None),
        ("Qwen3-30B-A3B", "dp=4,ep=4", PlanRequest(1000, 500, 64, prefix_hits=0.5, lora_rank=16), None),
        ("Qwen3-8B", "tp=1", PlanRequest(4000, 100, 1), 8.0),
        ("Qwen3-30B-A3B", "dp=4,ep=4", PlanRequest(1000, 500, 1, drafted=3, acceptance=0.5), 20.0),
    ],
)
def test_the_mean_step_is_the_predicted_itl(
    name: str, layout: str, request_: PlanRequest, rate: float | None
) -> None:
    config, machine = find_config(name)[1], parse_gpus("4xH100")
    if rate is None:
        one = predict(config, Layout.parse(layout), machine, request_)
    else:
        one = LayoutLoads(config, Layout.parse(layout), machine, request_).under(rate).planned
    steps = explain_steps(config, machine, request_, one, spread=rate is not None)
    load = request_.workload
    tokens = (load.output_len - 1) / load.decode_steps  # of a step
    assert sum(step.weight for step in steps) == pytest.approx(1) and steps[1].weight > 0.01
    assert one.itl_ms == pytest.approx(
        1e3 * sum(step.weight * step.seconds for step in steps) / tokens, rel=0.01
    )


def test_each_term_is_what_its_limit_costs() -> None:
    """8 sequences of 100 + 25 tokens, one dp group of two ranks; the device reads a byte in a ns."""
    machine = cluster(layer_overhead_s=3e-4, step_overhead_s=1e-3, num_devices=2, devices_per_node=2)
    shape = StepShape(8, 1000, 0, 0, 8)
    shares = tuple(step_shares(DENSE, Layout(tp=2), machine, REQUEST, GroupShapes(shape, shape)))
    decode = ExplainedStep("decode", shape, 1.0, shares)
    item = 2  # bytes; half of the heads and KV groups are on this rank
    assert decode.terms[KV] == pytest.approx(2 * 1000 * 2 * 1 * 50 * item * 1e-9)
    weights = (2 * 2 + 2 * 1) * 50 * 100 + 3 * 150 * 100
    columns = 8 * 3 * 150  # that a dense FFN writes and reads
    assert decode.terms[WEIGHTS] == pytest.approx(
        (2 * (weights + columns) + 500 * 100) * item * 1e-9, rel=1e-6
    )
    assert decode.terms[OVERHEADS] == pytest.approx(1e-3 + 2 * 3e-4)
    a_hop, bytes_ = 1e-6, 8 * 100 * item
    assert decode.terms["all-reduce"] == pytest.approx(
        5 * (a_hop + bytes_ * 1e-9)
    )  # 2 a layer, 1 of the embedding
    assert decode.operations("all-gather") == {"head": pytest.approx(1e-6 + 8 * 1000 * item * 1e-9 / 2)}
    assert PRODUCTS not in decode.terms and ACTIVATIONS in decode.terms
    _, prompt = explained(DENSE, machine, "tp=2")
    assert prompt.shape.prefill_tokens > 0 and prompt.terms[PRODUCTS] > 0


def test_multiplying_is_what_it_takes_beyond_reading() -> None:
    slow = replace(PLAIN.device, flops_per_s=1e8)
    machine = cluster(device=slow, num_devices=1, devices_per_node=1)
    decode, _ = explained(DENSE, machine, "tp=1")
    model = CostModel(DENSE, Layout(), machine)
    operations = decode.operations(PRODUCTS)
    reading = explained(DENSE, cluster(num_devices=1, devices_per_node=1), "tp=1")[0].operations(WEIGHTS)
    whole = model.step_parts(decode.shape)["dense FFN"]
    assert operations["dense FFN"] == pytest.approx(whole - reading["dense FFN"])
    measured = replace(slow, row_rates=((1.0, 1e8), (64.0, 1e8)))  # as calibrate writes them
    again, _ = explained(DENSE, replace(machine, device=measured), "tp=1")
    assert again.operations(PRODUCTS)["head"] == pytest.approx(operations["head"])


def test_waiting_in_a_pipeline_is_a_term() -> None:
    request = replace(REQUEST, max_num_batched_tokens=4096)
    decode, _ = explained(DENSE, cluster(inside=FAST, between=FAST), "pp=2", request)
    assert decode.terms[WAITS] == pytest.approx(
        CostModel(DENSE, Layout(pp=2), cluster(inside=FAST, between=FAST)).step_parts(decode.shape)[
            "pipeline"
        ]
    )


def test_dispatch_of_tokens_to_experts_stands_alone() -> None:
    machine = cluster(num_devices=4)
    decode, _ = explained(MOE, machine, "dp=2,ep=2")
    assert {"dispatch, all-gather", "dispatch, reduce-scatter"} < set(decode.terms)
    alone, _ = explained(MOE, machine, "tp=2,ep=2")
    assert not any(term.startswith("dispatch") for term in alone.terms)


def test_the_next_best_change_is_what_plan_says_of_it() -> None:
    _, config = find_config("Qwen3-30B-A3B")
    machine, request, layout = parse_gpus("8xH200"), PlanRequest(1000, 1000, 256), Layout.parse("tp=8,ep=8")
    changes = next_changes(config, machine, request, layout)
    assert [change.gain for change in changes] == sorted((change.gain for change in changes), reverse=True)
    by_option = {change.options.split()[0]: change for change in changes}
    moved, rounded = by_option["--layout"], by_option["--kv-cache-dtype"]
    planned = {str(one.layout): one for one in plan(config, machine, request)}
    found = moved.options.removeprefix("--layout ")
    assert planned[found] == moved.after and planned[str(layout)] == moved.before
    axes = [axis.name for axis in fields(Layout)]
    assert sum(getattr(moved.after.layout, axis) != getattr(layout, axis) for axis in axes) in (1, 2)
    near = [
        one for one in planned.values() if sum(getattr(one.layout, a) != getattr(layout, a) for a in axes) < 3
    ]
    assert moved.after.tokens_per_s == max(one.tokens_per_s for one in near if one.tokens_per_s)
    assert "reads 50% less KV a step (" in str(rounded) and str(rounded).endswith("answers change a little")
    assert not moved.changes_answers and f"ITL {moved.after.itl_ms:.3g} instead of" in str(moved)


def test_a_change_that_makes_room_says_so() -> None:
    """The KV cache of one GPU holds 178 of the 700 requests."""
    _, config = find_config("Qwen3-8B")
    request = PlanRequest(1000, 1000, 700)
    best = next_changes(config, parse_gpus("1xH100"), request, Layout())[0]
    assert str(best).startswith("--kv-cache-dtype fp8 keeps ") and "requests in flight instead of" in str(
        best
    )


def test_nothing_is_named_where_nothing_helps() -> None:
    idle = cluster(step_overhead_s=10.0, num_devices=1, devices_per_node=1)
    one_step_prompts = replace(REQUEST, concurrency=1, max_num_batched_tokens=4 * REQUEST.input_len)
    assert next_changes(DENSE, idle, one_step_prompts, Layout()) == []


def test_shares_know_nothing_of_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations that a later cost model may have are shown as they are named."""
    monkeypatch.setattr(
        CostModel, "step_parts", lambda self, shape: {"something new": 1e9 / self.device.flops_per_s}
    )
    shape = StepShape(1, 100, 0, 0, 1)
    shares = list(step_shares(DENSE, Layout(), PLAIN, REQUEST, GroupShapes(shape, shape)))
    assert [(share.term, share.operation) for share in shares] == [(PRODUCTS, "something new")]


def test_the_table_and_the_json_have_the_same_figures(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("explain", "Qwen3-30B-A3B", "--layout", "tp=8,ep=8", "--gpus", "8xH200", *LOAD)
    assert main([*asked]) == 0
    shown = capsys.readouterr().out
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["model", "cluster", "predicted", "steps", "changes", "expected_error"]
    assert set(found["expected_error"]) == {"points", "ttft", "itl"} and "error" in shown.splitlines()[-1]
    for step in found["steps"]:
        assert sum(step["terms"].values()) == pytest.approx(step["ms"], abs=0.01)
        for term, milliseconds in step["terms"].items():
            assert sum(step["operations"][term].values()) == pytest.approx(milliseconds, abs=0.01)
            assert f"{term} " in shown and f"{milliseconds:.2f}" in shown
    weights = found["predicted"]["bytes_per_rank"]["weights"]
    assert f"weights {weights / 1e9:.2f} GB" in shown
    for change in found["changes"]:
        assert f"{change['options']} {change['reason']}: ITL" in shown


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--layout", "tp=4", "--gpus", "6xH200"), "has 4 ranks, which do not divide the 6 devices"),
        (("--layout", "tp=2", "--gpus", "8xH100"), "layout tp=2 does not fit: weights of"),
        (("--layout", "tp=3", "--gpus", "8xH100"), "n_heads=64 is not divisible by tp=3"),
        (("--layout", "tp=8", "--gpus", "8xH100", "--input-len", "0"), "input_len must be positive, not 0"),
        (("--layout", "tp=8", "--gpus", "8xH100", "--input-len", "99999"), "exceed the model's context"),
        (("--gpus", "8xH100"), "the following arguments are required: --layout"),
    ],
)
def test_bad_input_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], sentence: str
) -> None:
    try:
        code: Any = main(["explain", "Qwen3-235B-A22B", *LOAD, *arguments])
    except SystemExit as error:
        code = error.code
    shown = capsys.readouterr()
    assert (code, shown.out) == (2, "") and sentence in shown.err and len(shown.err.splitlines()) == 1
