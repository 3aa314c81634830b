"""`qwen3-dist plan` as a user has it, and the planner behind it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.hardware import PRESETS, parse_gpus
from cluster.planning.limits import check_limits
from cluster.planning.official import find_config, official_configs
from cluster.planning.planner import PlanRequest, candidates, pareto_frontier, plan
from cluster.planning.ranking import TIE, ranked
from qwen3_dist.errors import ConfigError
from qwen3_dist.layout import Layout, divisors, valid_layouts
from serve_app.cli import build_parser, main
from tests.cluster.machines import DENSE, MOE, PLAIN, cluster

KEYS = [
    "layout", "fits", "reason", "bytes_per_rank", "max_batch",
    "ttft_ms", "ttft_p50_ms", "ttft_p90_ms", "ttft_p99_ms", "itl_ms", "tokens_per_s", "tokens_per_s_per_gpu",
    "cost", "breaks_first", "expected_error",
]  # fmt: skip
LOAD = ("--input-len", "1000", "--output-len", "500", "--concurrency", "64")
REQUEST = PlanRequest(1000, 500, 64)


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert main(["plan", *arguments, *LOAD, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence that a command line is refused with."""
    try:
        code: Any = main(["plan", *arguments])
    except SystemExit as error:
        code = error.code
    shown = capsys.readouterr()
    assert (code, shown.out) == (2, "") and len(shown.err.splitlines()) == 1
    return shown.err


def test_json_has_one_object_for_every_valid_layout(capsys: pytest.CaptureFixture[str]) -> None:
    rows = planned(capsys, "Qwen3-30B-A3B", "--gpus", "8xH100")
    _, config = find_config("Qwen3-30B-A3B")
    everything = {str(one) for world in (1, 2, 4, 8) for one in valid_layouts(config, world)}
    assert {row["layout"] for row in rows} == everything and len(rows) == len(everything)
    percentiles = {"ttft_p50_ms", "ttft_p90_ms", "ttft_p99_ms"}
    assert all(set(row) == set(KEYS) - (set() if row["fits"] else percentiles) for row in rows)
    fitting = [row for row in rows if row["fits"]]
    assert fitting and all(list(row["bytes_per_rank"]) == ["weights", "kv", "activations"] for row in fitting)
    rates = [row["tokens_per_s_per_gpu"] for row in fitting]
    assert rates[1:] == sorted(rates[1:], reverse=True) and rates[0] >= (1 - TIE) * rates[1]


def test_layouts_that_do_not_fit_say_why_and_come_last(capsys: pytest.CaptureFixture[str]) -> None:
    rows = planned(capsys, "Qwen3-235B-A22B", "--gpus", "8xH200")
    fits = [row["fits"] for row in rows]
    assert fits == sorted(fits, reverse=True) and set(fits) == {True, False}
    by_layout = {row["layout"]: row for row in rows}
    assert by_layout["tp=2,ep=2"]["tokens_per_s"] is None
    assert by_layout["tp=2,ep=2"]["reason"].startswith("weights of 235.1 GB and activations of")
    assert by_layout["tp=8"]["reason"] == ""


def test_tp_is_kept_inside_a_node() -> None:
    one = next(each for each in plan(DENSE, cluster(devices_per_node=2), REQUEST) if each.layout.tp == 4)
    assert one.reason == "tp=4 does not fit into nodes of 2 devices"


def test_small_layouts_run_as_replicas_that_share_the_load() -> None:
    found = {str(one.layout): one for one in plan(DENSE, PLAIN, REQUEST)}
    one, eight = found["tp=1"], found["dp=8"]
    assert (one.replicas, eight.replicas) == (8, 1)
    # Eight groups of one dense replica wait for each other's prompts; eight replicas do not.
    assert one.itl_ms < eight.itl_ms < 1.5 * one.itl_ms and one.tokens_per_s > eight.tokens_per_s
    assert eight.max_batch == pytest.approx(8 * one.max_batch, abs=8)


def test_a_batch_is_as_large_as_its_cache_allows() -> None:
    tight = cluster(device=replace(PLAIN.device, memory_bytes=4 * 10**6), num_devices=1)
    request = replace(REQUEST, max_num_batched_tokens=32, input_len=100, output_len=100)
    (one,) = plan(DENSE, tight, request)
    weights, activations = one.bytes_per_rank["weights"], one.bytes_per_rank["activations"]
    # 2 layers x K and V x 2 groups x 50 x 2 bytes = 800 bytes a token
    assert one.max_batch == (4 * 10**6 - weights - activations) // 800 // 200
    assert 0 < one.max_batch < 64 and one.bytes_per_rank["kv"] == one.max_batch * 200 * 800
    assert one.ttft_ms is not None and one.itl_ms is not None and one.ttft_ms > 200 * one.itl_ms  # they queue


def test_the_predicted_rate_is_sequences_over_the_time_each_takes() -> None:
    lone = cluster(num_devices=1)
    (one,) = plan(DENSE, lone, PlanRequest(1, 1000, 1))
    assert one.itl_ms is not None and one.tokens_per_s is not None
    # A decode step at the mean context of 501 tokens: 818.8 µs at 10, and 2 layers x 400 bytes for each more.
    assert one.itl_ms == pytest.approx(0.8188 + 491 * 0.8e-3, rel=2e-3)
    assert one.tokens_per_s == pytest.approx(1e3 / one.itl_ms, rel=1e-3)  # and the step of the prompt


@pytest.mark.parametrize("gpus", ["1xB200", "8xH100", "64xH200", "256xA100", "72xB200"])
def test_all_worlds_that_divide_the_cluster_are_planned(gpus: str) -> None:
    machine = parse_gpus(gpus)
    _, config = find_config("Qwen3-235B-A22B")
    found = plan(config, machine, replace(REQUEST, concurrency=1))
    worlds = divisors(machine.num_devices)
    assert {one.layout for one in found} == {o for world in worlds for o in valid_layouts(config, world)}
    assert len(found) == len(list(candidates(config, machine)))


@pytest.mark.parametrize("name", official_configs())
def test_every_official_size_can_be_planned(name: str) -> None:
    found = plan(find_config(name)[1], parse_gpus("16xH200"), REQUEST)
    assert found[0].fits and found[0].meets_limits(REQUEST)


def test_the_best_is_marked_and_holds_the_limits(capsys: pytest.CaptureFixture[str]) -> None:
    limits = ("--ttft-ms", "150", "--itl-ms", "8")
    assert main(["plan", "Qwen3-8B", "--gpus", "8xH100", *LOAD, *limits]) == 0
    table, legend, answers, serving = capsys.readouterr().out.split("\n\n")
    header, *lines = table.splitlines()
    assert header.split()[:3] == ["layout", "ranks", "replicas"]
    assert [line.startswith("*") for line in lines] == [True] + [False] * (len(lines) - 1)
    breaking = [line.endswith(" ms") for line in lines if "GB" in line]
    assert breaking == sorted(breaking) and True in breaking
    request = replace(REQUEST, ttft_ms=150, itl_ms=8)
    best, *others = plan(find_config("Qwen3-8B")[1], parse_gpus("8xH100"), request)
    held = [one.tokens_per_s_per_gpu or 0 for one in others if one.meets_limits(request)]
    assert best.meets_limits(request) and (best.tokens_per_s_per_gpu or 0) >= (1 - TIE) * max(held)


def test_one_layout_is_planned_alone(capsys: pytest.CaptureFixture[str]) -> None:
    everything = {row["layout"]: row for row in planned(capsys, "Qwen3-8B", "--gpus", "8xH100")}
    [row] = planned(capsys, "Qwen3-8B", "--gpus", "8xH100", "--layout", "tp=2,dp=2")
    same = set(row) - {"breaks_first", "expected_error"}
    assert {key: row[key] for key in same} == {key: everything["tp=2,dp=2"][key] for key in same}
    rate = ("Qwen3-8B", "--gpus", "H100", *LOAD[:4], "--rate", "9", "--layout", "tp=2", "--json")
    assert main(["plan", *rate]) == 0
    assert json.loads(capsys.readouterr().out)["layout"] == "tp=2"
    assert "Qwen3-32B does not fit; with tp=1" in refusal(
        capsys, "Qwen3-32B", "--gpus", "2xH100", *LOAD, "--layout", "tp=1", "--kv-cache-dtype", "bfloat16",
        "--max-num-batched-tokens", "65536",
    )  # fmt: skip


def test_of_layouts_that_hardly_differ_the_simplest_is_best(capsys: pytest.CaptureFixture[str]) -> None:
    rates = {
        "tp=2,pp=2": 100.0,
        "tp=4,ep=4": 99.9,
        "dp=4,ep=4": 99.8,
        "dp=4": 98.1,
        "tp=4": 98.2,
        "tp=1": 97.9,
    }
    for chosen, late in (("tp=4", ()), ("tp=4,ep=4", ("tp=4", "dp=4"))):
        order = ranked(rates, Layout.parse, rates.__getitem__, lambda one: (one in late,))  # noqa: B023
        assert order[0] == chosen
        assert order[1:] == sorted(order[1:], key=lambda one: (one in late, -rates[one]))  # noqa: B023
    best, *others = planned(capsys, "Qwen3-30B-A3B", "--gpus", "2xH100")
    assert main(["plan", "Qwen3-30B-A3B", "--gpus", "2xH100", *LOAD]) == 0
    shown = capsys.readouterr().out
    tied = [line.split()[1] for line in shown.partition("\n\n")[0].splitlines() if line.startswith("=")]
    fast = (1 - TIE) * max(one["tokens_per_s_per_gpu"] for one in (best, *others))
    assert tied == [one["layout"] for one in others if one["tokens_per_s_per_gpu"] >= fast]
    assert tied and "predictions do not tell apart" in shown


def test_the_table_explains_its_marks_and_ends_with_the_best_layouts_serve_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["plan", "Qwen3-235B-A22B", "--gpus", "2x8xH200", *LOAD, "--itl-ms", "40"]
    assert main(arguments) == 0
    table, legend, answers, serving = capsys.readouterr().out.split("\n\n")
    best = table.splitlines()[1].split()[1]
    assert "exceed" not in table and "--all lists them" in legend
    assert all(word in legend for word in ("*", "replicas", "max batch"))
    command = serving.splitlines()[1].strip()
    assert command.startswith(f"qwen3-dist serve Qwen3-235B-A22B --layout {best} ")
    assert build_parser().parse_args(command.split()[1:]).ray_address == "auto"
    assert main([*arguments, "--all"]) == 0
    everything = capsys.readouterr().out
    assert "exceed" in everything and "--all" not in everything


def test_an_impossible_limit_is_named_with_the_nearest_that_holds(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("Qwen3-8B", "--gpus", "8xH100", *LOAD)
    for limit, name in ((("--itl-ms", "1"), "itl_ms"), (("--ttft-ms", "2"), "ttft_ms")):
        sentence = refusal(capsys, *asked, *limit)
        assert f"no layout meets {' '.join(limit)} at concurrency 64: the lowest is" in sentence
        nearest = sentence.rpartition(" is ")[2].strip()
        assert main(["plan", *asked, limit[0], nearest, "--json"]) == 0
        best = json.loads(capsys.readouterr().out.splitlines()[0])
        assert 0.9 * float(nearest) < best[name] <= float(nearest)


def test_limits_that_no_layout_holds_together_say_which_breaks() -> None:
    slow, fast = plan(MOE, cluster(num_devices=2), REQUEST)[:2]
    slow, fast = replace(slow, ttft_ms=5.0, itl_ms=20.0), replace(fast, ttft_ms=50.04, itl_ms=2.0)
    with pytest.raises(ConfigError) as refused:
        check_limits([slow, fast], replace(REQUEST, ttft_ms=10, itl_ms=5))
    assert "--ttft-ms 10 is too low by 80%; the nearest that can be met is 50.1" in str(refused.value)


def test_where_nothing_fits_the_list_says_why_and_the_last_line_what_to_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", "Qwen3-235B-A22B", "--gpus", "2xH100", *LOAD, "--all"]) == 2
    shown = capsys.readouterr()
    assert "exceed the 76.5 GB of a rank" in shown.out and "*" not in shown.out
    (sentence,) = shown.err.splitlines()
    assert sentence.startswith("qwen3-dist: no layout of Qwen3-235B-A22B fits; with ")
    assert sentence.endswith("take larger GPUs or more than 2")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("Qwen3-8B", *LOAD), "the following arguments are required: --gpus or --cluster"),
        (("Qwen3-8B", "--gpus", "8xT4", *LOAD), "there is no preset 'T4'"),
        (("Qwen3-8B", "--cluster", "none.yaml", *LOAD), "none.yaml cannot be read"),
        (("Qwen3-9B", "--gpus", "8xH100", *LOAD), "models that need no download are Qwen3-0.6B"),
        (("Qwen3-8B", "--gpus", "8xH100"), "required: --input-len, --output-len, --concurrency"),
        (("Qwen3-8B", "--gpus", "8xH100", *LOAD, "--input-len", "0"), "input_len must be positive, not 0"),
        (("Qwen3-8B", "--gpus", "8xH100", *LOAD, "--acceptance", "0.5"), "drafted tokens; give the number"),
        (("Qwen3-8B", "--gpus", "8xH100", *LOAD, "--prefix-hits", "2"), "of at least 0 and at most 1"),
        (("Qwen3-8B", "--gpus", "8xH100", *LOAD, "--itl-ms", "-1"), "itl_ms must be positive, not -1"),
        (
            ("Qwen3-8B", "--gpus", "8xH100", *LOAD, "--input-len", "50000"),
            "lower --input-len or --output-len",
        ),
        (("Qwen3-30B-A3B", "--gpus", "8xH100", *LOAD, "--expert-imbalance", "0.5"), "must be at least 1"),
        (
            ("Qwen3-8B", "--gpus", "8xH100", *LOAD, "--plot", "/no/such/p.png"),
            "p.png cannot be written (No such file or directory); choose another",
        ),
    ],
)
def test_bad_input_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], sentence: str
) -> None:
    assert sentence in refusal(capsys, *arguments)


def test_a_plan_needs_a_config_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(official_configs()["Qwen3-8B"]))
    by_name = planned(capsys, "Qwen/qwen3-8b", "--gpus", "2xA100")
    assert by_name == planned(capsys, str(file), "--gpus", "2xA100")
    assert by_name == planned(capsys, str(tmp_path), "--gpus", "2xA100")
    assert planned(capsys, "bundled", "--gpus", "2xA100") == planned(capsys, "--gpus", "2xA100")


def test_a_cluster_file_is_planned_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("preset: H100\nnum_devices: 16\nbetween: {bytes_per_s: 1e9}\n")
    slow = {row["layout"]: row for row in planned(capsys, "Qwen3-30B-A3B", "--cluster", str(file))}
    fast = {row["layout"]: row for row in planned(capsys, "Qwen3-30B-A3B", "--gpus", "16xH100")}
    assert slow.keys() == fast.keys()
    inside, across = "tp=8,ep=8", "tp=8,dp=2,ep=16"
    assert slow[inside]["itl_ms"] == fast[inside]["itl_ms"]
    assert slow[across]["itl_ms"] > fast[across]["itl_ms"]


def test_the_frontier_holds_what_nothing_beats_in_both() -> None:
    one = plan(DENSE, PLAIN, REQUEST)[0]
    values = [(10.0, 100.0), (20.0, 200.0), (20.0, 150.0), (40.0, 250.0), (30.0, 120.0)]
    several = [replace(one, itl_ms=itl, tokens_per_s_per_gpu=rate) for itl, rate in values]
    found = [(each.itl_ms, each.tokens_per_s_per_gpu) for each in pareto_frontier(several)]
    assert found == [(10.0, 100.0), (20.0, 200.0), (40.0, 250.0)]


def test_the_chart_is_a_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    planned(capsys, "Qwen3-8B", "--gpus", "4xH100", "--plot", str(tmp_path / "plan.png"))
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_chart_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("cluster.planning.plots.can_plot", lambda: False)
    sentence = refusal(capsys, "Qwen3-8B", "--gpus", "4xH100", *LOAD, "--plot", str(tmp_path / "plan.png"))
    assert "plots need matplotlib; pip install 'qwen3-dist[plots]', or leave --plot out" in sentence


def test_presets_order_as_their_datasheets_do() -> None:
    best = {}
    for name in PRESETS:
        found = plan(find_config("Qwen3-8B")[1], parse_gpus(f"1x{name}"), REQUEST)[0]
        best[name] = found.tokens_per_s or 0
    assert sorted(best, key=lambda name: best[name]) == ["A100", "H100", "H200", "B200"]


def test_large_clusters_and_loads_are_planned_in_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    rows = planned(capsys, "Qwen3-8B", "--gpus", "83160xH100", "--concurrency", "10000000")
    assert max(Layout.parse(row["layout"]).world for row in rows) <= 1024 and rows[0]["fits"]
    [row] = planned(capsys, "Qwen3-8B", "--gpus", "83160xH100", "--layout", "tp=4,pp=2,dp=315")
    assert row["layout"] == "tp=4,dp=315,pp=2"


def test_layouts_are_as_the_library_writes_them(capsys: pytest.CaptureFixture[str]) -> None:
    for row in planned(capsys, "Qwen3-30B-A3B", "--gpus", "4xH200"):
        assert str(Layout.parse(row["layout"])) == row["layout"]
