"""The fewest devices for a rate, against every smaller number tried one by one."""

from __future__ import annotations

import json
from dataclasses import replace
from math import ceil
from typing import Any

import pytest

from cluster.hardware import Cluster, parse_gpus
from cluster.planning import fleet
from cluster.planning.fleet import all_under, fewest
from cluster.planning.official import find_config
from cluster.planning.planner import PlanRequest
from qwen3_dist.config import ModelConfig
from qwen3_dist.errors import ConfigError
from serve_app.cli import main
from tests.cluster.machines import DENSE, MOE, PLAIN, cluster
from tests.serve_app.command_line import printed, refusal

REQUEST = PlanRequest(100, 50, 1, max_num_batched_tokens=64)
LOAD = ("--input-len", "1000", "--output-len", "500")
TIGHT = cluster(device=replace(PLAIN.device, memory_bytes=4 * 10**6))


def holds(config: ModelConfig, kind: Cluster, devices: int, request: PlanRequest, rate: float) -> bool:
    return all_under(config, replace(kind, num_devices=devices), request, rate)[0].holds


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("times", [0.5, 1.5, 3.7, 9])
def test_no_smaller_number_of_devices_serves_the_rate(config: ModelConfig, times: float) -> None:
    one = all_under(config, replace(TIGHT, num_devices=1), REQUEST, 1.0)[0]
    request = replace(REQUEST, itl_ms=1.5 * (one.planned.itl_ms or 0))
    rate = times * all_under(config, replace(TIGHT, num_devices=1), request, 1.0)[0].most_per_s
    found = fewest(config, TIGHT, request, rate)
    devices = found.cluster.num_devices
    assert found.found.holds and found.found.headroom >= 0
    assert devices <= 4 or devices % 4 == 0  # whole nodes
    assert holds(config, TIGHT, devices, request, rate)
    assert not any(holds(config, TIGHT, n, request, rate) for n in (1, 2, 3, 4, 8, 12) if n < devices)
    assert devices * one.most_per_s >= rate / 3  # and it is not far too many


def test_replicas_follow_from_what_one_serves() -> None:
    alone = all_under(DENSE, replace(TIGHT, num_devices=1), REQUEST, 1.0)[0].most_per_s
    found = fewest(DENSE, TIGHT, REQUEST, 2.5 * alone).found
    assert found.planned.replicas * found.planned.layout.world == 3
    assert found.most_per_s >= 2.5 * alone


def test_few_predictions_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0
    real = fleet.LayoutLoads.at

    def counted(self: Any, sequences: int) -> Any:
        nonlocal asked
        asked += sequences not in self._predictions
        return real(self, sequences)

    monkeypatch.setattr(fleet.LayoutLoads, "at", counted)
    _, config = find_config("Qwen3-30B-A3B")
    request = PlanRequest(1000, 500, 1, itl_ms=50)
    counts = []
    for rate in (4, 400):
        asked = 0
        devices = fewest(config, parse_gpus("8xH100"), request, rate).cluster.num_devices
        counts.append((devices, asked))
    (few, _), (many, predictions) = counts
    # The predictions do not grow with the number of devices: layouts of eight sizes of a node, and of five of nodes.
    assert many > 5 * few and predictions < 20_000


def test_what_no_number_of_devices_changes_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for limit, name in (("--itl-ms", "itl_ms"), ("--ttft-ms", "ttft_ms")):
        asked = ("plan", "Qwen3-8B", "--gpus", "H100", *LOAD, "--rate", "1")
        sentence = refusal(capsys, *asked, limit, "0.5")
        assert (
            f"no number of H100 meets {limit} 0.5 even idle: the lowest is" in sentence
            and "% more" in sentence
        )
        lowest, _, more = sentence.partition(": the lowest is ")[2].partition(" ms, ")
        assert float(more.partition("%")[0]) == pytest.approx(100 * (float(lowest) / 0.5 - 1), abs=2)
        nearest = sentence.rpartition(" is ")[2].strip()
        row = json.loads(printed(capsys, *asked, limit, nearest, "--json"))
        assert 0.9 * float(nearest) < row[name] <= float(nearest)
    with pytest.raises(ConfigError, match="no number of plain holds the model with this load"):
        fewest(DENSE, cluster(device=replace(PLAIN.device, memory_bytes=10**5)), REQUEST, 1)


def test_a_cluster_that_is_too_small_says_the_size_that_serves(capsys: pytest.CaptureFixture[str]) -> None:
    load = (*LOAD, "--ttft-ms", "2000", "--itl-ms", "60")
    sentence = refusal(capsys, "plan", "Qwen3-8B", "--gpus", "2xH100", *load, "--rate", "200")
    assert "2 x H100 serve at most " in sentence and " less than --rate 200" in sentence
    assert " within --ttft-ms 2000 and --itl-ms 60, with " in sentence
    enough = sentence.partition("; ")[2].partition(" x H100 serve it")[0]
    rows = printed(capsys, "plan", "Qwen3-8B", "--gpus", f"{enough}xH100", *load, "--rate", "200", "--json")
    assert json.loads(rows.splitlines()[0])["holds"]
    assert int(enough) % 8 == 0
    fewer = str(int(enough) - 8)
    assert "serve at most" in refusal(
        capsys, "plan", "Qwen3-8B", "--gpus", f"{fewer}xH100", *load, "--rate", "200"
    )
    most = float(sentence.partition("at most ")[2].partition(" ")[0])
    assert main(["plan", "Qwen3-8B", "--gpus", "2xH100", *load, "--rate", str(0.99 * most), "--json"]) == 0


def test_layouts_at_a_rate_are_ordered_by_what_they_serve(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("plan", "Qwen3-30B-A3B", "--gpus", "8xH100", *LOAD, "--rate", "10", "--itl-ms", "30")
    rows = [json.loads(line) for line in printed(capsys, *arguments, "--json").splitlines()]
    most = [row["most_requests_per_s"] for row in rows if row["fits"]]
    assert most[1:] == sorted(most[1:], reverse=True) and rows[0]["holds"] and most[0] >= 0.98 * most[1]
    assert all(row["requests_per_s"] == 10 for row in rows)
    shown = printed(capsys, *arguments)
    table, legend, _, _ = shown.split("\n\n")
    assert table.splitlines()[1].startswith(f"*  {rows[0]['layout']} ") and "in flight" in table
    assert "Little's law" in legend and "max batch" not in shown


def test_the_simulator_has_as_many_requests_in_flight(capsys: pytest.CaptureFixture[str]) -> None:
    load = ("Qwen3-8B", "--gpus", "1xH100", *LOAD, "--json")
    most = json.loads(printed(capsys, "plan", *load, "--rate", "1"))["most_requests_per_s"]
    rate = 0.5 * most
    planned = json.loads(printed(capsys, "plan", *load, "--rate", str(rate)))
    simulated = json.loads(printed(capsys, "simulate", *load, "--rate", str(rate), "--duration", "40"))
    assert planned["in_flight"] == pytest.approx(rate * simulated["latency_s"]["p50"], rel=0.1)


def test_replicas_of_a_shared_host_cannot_be_added() -> None:
    host = cluster(num_devices=4, shared_host=True)
    found = all_under(DENSE, host, REQUEST, 1e9)
    with pytest.raises(
        ConfigError, match="4 x plain serve at most .* less than --rate 1e\\+09; lower --rate"
    ):
        fleet.check_rate(DENSE, host, REQUEST, 1e9, found)


def test_devices_of_more_than_a_node_are_whole_nodes() -> None:
    node = replace(PLAIN, devices_per_node=8)
    assert [
        fleet._devices(node, world, replicas) for world, replicas in ((1, 8), (1, 9), (3, 2), (4, 3))
    ] == [8, 16, 6, 16]
    assert fleet._devices(node, 3, 3) is None  # two of a node's devices would be left
    assert fleet._devices(node, 16, 3) == 48 == ceil(48 / 8) * 8
