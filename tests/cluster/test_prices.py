"""What tokens cost, and which kind of GPUs is the cheapest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.hardware import PRESETS, as_dict, parse_gpus, read_cluster
from cluster.planning.gpu_kinds import parse_kinds
from cluster.planning.prices import costs, read_prices
from qwen3_dist.errors import ConfigError
from tests.cluster.machines import PLAIN
from tests.serve_app.command_line import printed, refusal

LOAD = ("--input-len", "1000", "--output-len", "500")
RATE = (*LOAD, "--rate", "40", "--ttft-ms", "2000", "--itl-ms", "50")


def rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in printed(capsys, "plan", "Qwen3-8B", *arguments, "--json").splitlines()
    ]


def test_costs_are_worked_out_by_hand() -> None:
    # 10 devices at 3 an hour make 1,000 tokens a second: 3.6 million an hour for 30.
    machine = replace(PLAIN, num_devices=8, device=replace(PLAIN.device, power_w=500.0))
    found = costs(machine, 1000.0, 3.0)
    assert found == {
        "cost_per_hour": 24.0,
        "cost_per_million_tokens": pytest.approx(24 / 3.6, abs=1e-4),
        "tokens_per_currency_unit": 150_000.0,
        "tokens_per_joule": 0.25,
        "kwh_per_million_tokens": pytest.approx(4e6 / 3.6e6, abs=1e-4),
    }


def test_what_is_not_known_is_left_out() -> None:
    assert costs(PLAIN, 1000.0, None) == {}
    assert set(costs(PRESETS["H100"], 1000.0, None)) == {"tokens_per_joule", "kwh_per_million_tokens"}
    assert costs(PRESETS["H100"], 0.0, 2.0) == {}


def test_every_preset_has_the_power_of_its_datasheet(tmp_path: Path) -> None:
    assert {name: preset.device.power_w for name, preset in PRESETS.items()} == {
        "A100": 400, "H100": 700, "H200": 700, "B200": 1000,
    }  # fmt: skip
    file = tmp_path / "cluster.yaml"
    file.write_text("preset: H100\ndevice: {power_w: 550}\n")
    assert read_cluster(file).device.power_w == 550
    assert "power_w" in as_dict(PRESETS["H100"])["device"] and "power_w" not in as_dict(PLAIN)["device"]
    file.write_text("preset: H100\ndevice: {power_w: -1}\n")
    with pytest.raises(ConfigError, match=r"cluster.yaml:2: .*power_w must not be negative"):
        read_cluster(file)


def test_prices_are_read_in_three_forms(tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text("# an hour, in euros\nh100: 2.5\nH200: 3.5\nB200: 6\n")
    assert read_prices("2.5", ["H100"]) == {"H100": 2.5}
    assert read_prices("h100=2.5, H200=3.5", ["H100", "H200"]) == {"H100": 2.5, "H200": 3.5}
    assert read_prices(str(file), ["H100", "H200"]) == {"H100": 2.5, "H200": 3.5}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "cheap",
            "--price must be a positive number, pairs such as H100=2.5,H200=3.5, or a .yaml file, not 'cheap'",
        ),
        ("0", "--price must be a positive number, pairs such as H100=2.5,H200=3.5, or a .yaml file, not '0'"),
        (
            "inf",
            "--price must be a positive number, pairs such as H100=2.5,H200=3.5, or a .yaml file, not 'inf'",
        ),
        ("2.5", "--price 2.5 is one price for 2 kinds of GPUs; write it as H100=2.5,H200=2.5"),
        ("H100=2.5", "--price H100=2.5 has no price of H200; add H200=PRICE"),
        ("H100=2.5,H200", "--price 'H200' is not KIND=PRICE"),
        ("H100=2.5,H200=x", "--price H200 must be a positive number, not 'x'"),
        ("H100=2.5,h100=3,H200=1", "--price gives h100 twice; keep one"),
        ("none.yaml", "none.yaml cannot be read (No such file or directory)"),
    ],
)
def test_a_wrong_price_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_prices(text, ["H100", "H200"])
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("H100: 2.5\nH200: free\n", "prices.yaml:2: the price of H200 must be a positive number, not 'free'"),
        ("H100: 2.5\n\nH200: -3\n", "prices.yaml:3: the price of H200 must be a positive number, not '-3'"),
        ("H100: {hour: 2}\nH200: 1\n", "prices.yaml:1: the price of H100 must be a number"),
        ("H100: 2.5\nH200:\n", "prices.yaml:2: the price of H200 must be a number, not None"),
        ("H100: 2.5\nH100: 3\n", "prices.yaml:2: H100 is given twice; keep one"),
        ("H100: 2.5\nh100: 3\n", "prices.yaml:2: there is another price of H100; keep one"),
        (
            "H100: 1e308\nH200: 1\n",
            "the price of H100 must be a positive number from 1e-06 to 1e+09, not '1e308'",
        ),
        ("H100: 2.5\nH20O: 3\n", "prices.yaml has no price of H200; add a line `H200: PRICE`"),
        ("- 2.5\n", "prices.yaml:1: a mapping `key: value` is expected"),
    ],
)
def test_a_wrong_line_of_a_file_of_prices_is_named(
    lines: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(lines)
    told = refusal(capsys, "plan", "Qwen3-8B", "--gpus", "H100,H200", *RATE, "--price", str(file))
    assert sentence in told


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--gpus", "H100", *LOAD, "--concurrency", "8"), "has no number of GPUs; write 8xH100, or give --rate"),
        (("--gpus", "8xH100,H200", *RATE), "gives a number of some kinds alone"),
        (("--gpus", "H100,h100", *RATE), "--gpus H100,h100 gives H100 twice; keep one"),
        (("--gpus", "H100,T4", *RATE), "there is no preset 'T4'"),
        (("--gpus", "H100,", *RATE), "'' is not a number of GPUs"),
        (("--gpus", "H100", *RATE, "--plot", "p.png"), "--plot draws the layouts of one cluster"),
        (("--gpus", "8xH100", *RATE, "--concurrency", "8"), "--concurrency: not allowed with argument --rate"),
        (("--gpus", "8xH100", *LOAD, "--rate", "0"), "'0' is not a number above 0"),
        (("--gpus", "8xH100", *LOAD, "--rate", "1e300"), "'1e300' is not a number above 0 and at most 1e+09"),
        (("--gpus", "H100", *LOAD, "--rate", "1e9"), "and at most 1,000,000 are planned for; lower it"),
        (("--gpus", "10000000xH100", *LOAD, "--rate", "1"), "num_devices must be at most 1,000,000, not 1e+07"),
        (("--gpus", "8xH100", *LOAD), "required: --concurrency or --rate"),
        (("--gpus", "8xH100", *RATE, "--layout", "tp=16"), "layout tp=16 has 16 ranks, which do not divide the 8"),
        (("--gpus", "8xH100", *RATE, "--layout", "tp=3"), "n_heads=32 is not divisible by tp=3"),
        (("--gpus", "8xH100", *RATE, "--out", "f"), "--out is the file of --render"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused(
    arguments: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refusal(capsys, "plan", "Qwen3-8B", *arguments)


def test_kinds_are_read() -> None:
    assert [(kind.name, kind.sized) for kind in parse_kinds("H100,b200")] == [
        ("H100", False),
        ("B200", False),
    ]
    assert [kind.cluster for kind in parse_kinds("4xH100,2x8xH200")] == [
        parse_gpus("4xH100"),
        parse_gpus("2x8xH200"),
    ]


def test_the_cheapest_kind_comes_first_and_prices_decide(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ("--gpus", "H100,H200,B200", *RATE)
    by_number = rows(capsys, *kinds)
    numbers = {row["gpus"].partition("x")[2]: row["num_gpus"] for row in by_number}
    assert [row["num_gpus"] for row in by_number] == sorted(numbers.values())
    for cheap in numbers:
        # All kinds cost 10 an hour for all that it takes, and this one 1.
        prices = ",".join(
            f"{kind}={(1 if kind == cheap else 10) / number}" for kind, number in numbers.items()
        )
        first, *others = rows(capsys, *kinds, "--price", prices)
        assert first["gpus"].endswith(cheap) and first["cost"]["cost_per_hour"] == pytest.approx(1, abs=1e-3)
        assert all(row["cost"]["cost_per_hour"] == pytest.approx(10, abs=1e-3) for row in others)
        # 40 requests a second of 500 tokens.
        assert first["cost"]["tokens_per_currency_unit"] == pytest.approx(40 * 500 * 3600, rel=1e-3)
        assert first["breaks_first"] is not None and all(row["breaks_first"] is None for row in others)


def test_a_kind_that_cannot_serve_says_why_below_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("plan", "Qwen3-235B-A22B", "--gpus", "2xH100,8xH200", *LOAD, "--concurrency", "16")
    shown = printed(capsys, *asked)
    assert "2xH100: no layout fits 2 x H100; take larger GPUs or more of them." in shown
    assert shown.splitlines()[1].startswith("*  8xH200 ") and "qwen3-dist serve Qwen3-235B-A22B" in shown
    both = refusal(capsys, *asked, "--itl-ms", "0.01")
    assert "no layout fits 2 x H100" in both and "no layout meets --itl-ms 0.01" in both


def test_layouts_of_one_cluster_cost_by_their_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, "--gpus", "4xH100", *LOAD, "--concurrency", "32", "--price", "2")
    assert len(found) > 3
    for row in found:
        assert row["cost"]["cost_per_hour"] == 8
        assert row["cost"]["tokens_per_currency_unit"] == pytest.approx(
            row["tokens_per_s"] * 3600 / 8, rel=1e-3
        )
    text = printed(
        capsys, "plan", "Qwen3-8B", "--gpus", "4xH100", *LOAD, "--concurrency", "32", "--price", "2"
    )
    assert "(8.00 an hour, " in text and " kWh for a million output tokens" in text
