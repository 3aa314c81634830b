"""Calibration: fits find what made the numbers, and a real run gives a file that the cost model reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.calibration import between_nodes, collective_probe, noise, probes, step_probe
from cluster.calibration.calibrate import Calibration, _with_nodes, calibrate
from cluster.calibration.collective_probe import COLLECTIVES
from cluster.calibration.step_probe import LAYERS, fit_ranks, with_overheads
from cluster.hardware import Cluster, Link, read_cluster
from cluster.planning.cost_model import CostModel, StepShape
from qwen3_dist.errors import ResourceError
from qwen3_dist.launch.launcher import Launcher
from qwen3_dist.layout import Layout
from qwen3_dist.worker import cards
from serve_app.cli import main
from tests.cluster.machines import DENSE, cluster
from tests.ranks import ROOT
from tests.stand_in_cards import rank_on_stand_in, take_stand_in

SMALL = probes.Sizes(inner=64, outputs=128, matrices=2, read_bytes=1 << 22, expert_columns=32, repeats=2)


def made_steps(machine: Cluster, layout: Layout) -> list[tuple[int, int, float]]:
    """The steps that `decode_steps` would measure on a machine which the model describes exactly."""
    return [
        (layers, batch, step_probe._predicted(machine, layout, layers, batch))
        for layers in LAYERS
        for batch in step_probe.BATCHES
    ]


def test_overheads_are_found_from_the_steps_that_they_made() -> None:
    plain = cluster(num_devices=2, devices_per_node=2, shared_host=True)
    true = replace(
        plain, step_overhead_s=2e-4, sequence_overhead_s=6e-6, layer_overhead_s=3e-5, token_overhead_s=1e-6
    )
    # A decode's token is counted with its sequence.
    steps = made_steps(replace(true, token_overhead_s=0.0), Layout())
    prompt_s = CostModel(step_probe._config(LAYERS[0]), Layout(), true).step_seconds(
        StepShape(0, 0, 256, 256 * 257 // 2, 1)
    )
    found = with_overheads(plain, steps, prompt_s)
    for name in ("step_overhead_s", "sequence_overhead_s", "layer_overhead_s", "token_overhead_s"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-6), name


def test_what_ranks_add_is_found_for_a_step_and_for_a_collective() -> None:
    plain = cluster(num_devices=2, devices_per_node=2, shared_host=True)
    slower = replace(plain.inside, latency_s=plain.inside.latency_s + 4e-5)
    steps = made_steps(replace(plain, ranks_overhead_s=3e-4, inside=slower), Layout(tp=2))
    ranks_s, collective_s = fit_ranks(plain, Layout(tp=2), steps)
    # Besides two in each layer there is one for the embedding and one for the head: they count with the step.
    assert collective_s == pytest.approx(4e-5, rel=1e-6)
    assert ranks_s == pytest.approx(3e-4 + 2 * 4e-5, rel=1e-6)


def test_faster_than_predicted_is_no_negative_overhead() -> None:
    machine = cluster(num_devices=2, devices_per_node=2)
    steps = [(layers, batch, 1e-9) for layers, batch, _ in made_steps(machine, Layout())]
    found = with_overheads(machine, steps, 1e-9)
    assert (found.step_overhead_s, found.layer_overhead_s, found.token_overhead_s) == (0, 0, 0)


def test_a_link_is_found_from_the_times_that_it_made() -> None:
    points = [(size, 2e-5 + 0.5 * size / 3e9) for size in (2048, 1 << 16, 1 << 20)]
    found = collective_probe.fit(points, 0.5)
    assert found.latency_s == pytest.approx(2e-5) and found.bytes_per_s == pytest.approx(3e9)
    assert collective_probe.fit([(1, 3.0), (2, 2.0)], 1.0).latency_s >= 0


def test_attention_costs_are_those_of_the_model() -> None:
    moved, operations = probes.attention_costs(context=4, queries=2)
    assert moved == 4 * 2 * 8 * 128 * 2  # tokens, K and V, groups, head_dim, bytes
    assert operations == (3 + 4) * 4 * 16 * 128  # pairs, two products, heads, head_dim


def test_a_real_calibration_measures_collectives_between_real_ranks_and_writes_a_file_that_predicts(
    nursery: None, tmp_path: Path
) -> None:
    said: list[str] = []
    threads = torch.get_num_threads()
    try:
        found = calibrate("cpu", said.append, SMALL, rows=(1, 8, 64))
    finally:
        torch.set_num_threads(threads)
    found.write(tmp_path / "hardware.yaml")
    read = read_cluster(tmp_path / "hardware.yaml")
    assert read == found.cluster and read.shared_host
    assert [rows for rows, _ in read.device.row_rates] == [1, 8, 64]
    assert read.device.flops_per_s == max(rate for _, rate in read.device.row_rates)
    assert CostModel(DENSE, Layout(), read).step_seconds(StepShape(4, 400, 0, 0, 4)) > 0
    if read.num_devices > 1:
        assert isinstance(read.inside.all_reduce, Link) and isinstance(read.inside.all_to_all, Link)
        assert CostModel(DENSE, Layout(tp=2), read).step_seconds(StepShape(4, 400, 0, 0, 4)) > 0
    collectives = found.measured.get("collective_seconds") or collective_probe.measure(2, "cpu")
    assert list(collectives) == list(collective_probe.COLLECTIVES)
    for points in collectives.values():
        assert [size for size, _ in points] == list(collective_probe.BYTES)
        assert all(seconds > 0 for _, seconds in points)
    json.dumps(found.measured)
    assert said[0] == "memory bandwidth" and 0 <= found.about["cpu_share_of_others"] <= 1


def test_the_branch_for_gpus_runs_on_a_card_that_computes_nothing(tmp_path: Path) -> None:
    """Its kernels are compiled for the card, and every time is taken between two waits for it."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.fake_calibration"]
    ended = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    (tmp_path / "hardware.yaml").write_text(json.dumps(found["cluster"]))
    read = read_cluster(tmp_path / "hardware.yaml")
    assert (read.device_kind, read.num_devices, read.devices_per_node) == ("cuda", 2, 2)
    assert (read.device.name, read.device.memory_bytes, read.device.memory_utilization) == (
        "a card of sm_90",
        80 * 10**9,
        0.9,
    )
    assert [rows for rows, _ in read.device.row_rates] == [1, 16, 64]
    assert read.inside.latency_s == 5e-6 and read.inside.bytes_per_s == 2e11  # of what stands for NCCL
    assert {"_attend", "_grouped"} < set(found["kernels"])
    runs = 3 * (1 + 3 + 2 + 3)  # with the warm-up: of reading, rows, attention, experts
    assert found["synchronized"] == 2 * runs
    assert "read_bytes_per_s_one_core" not in found["measured"]


def test_small_models_run_on_cards(nursery: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process and in ranks, which compute on the CPU and report a card."""
    monkeypatch.setattr(Launcher, "main", staticmethod(rank_on_stand_in))
    monkeypatch.setattr(cards, "set_card", take_stand_in)
    fakes = {"is_available": True, "device_count": 2, "current_device": 0, "empty_cache": None}
    monkeypatch.setattr(torch.cuda, "get_device_name", str)
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(step_probe, "_OUTPUT", 4)
    monkeypatch.setattr(step_probe, "BATCHES", (1, 2))
    for layout in (Layout(), Layout(tp=2)):
        steps = step_probe.decode_steps(layout, "cuda")
        assert [(layers, batch) for layers, batch, _ in steps] == [(2, 1), (2, 2), (18, 1), (18, 2)]
        assert all(seconds > 0 for _, _, seconds in steps)
    assert step_probe.prompt_step("cuda") > 0


def test_nodes_are_counted_with_their_gpus_and_a_host_stays_one() -> None:
    points = {kind: [(size, 1e-4 + 0.5 * size / 1e9) for size in (2048, 1 << 20)] for kind in COLLECTIVES}
    machine, said = cluster(num_devices=8, devices_per_node=8), list[str]()
    several = _with_nodes(machine, "cuda", points, [8, 8, 4], said.append)
    assert (several.num_devices, several.devices_per_node) == (12, 4)
    assert several.between.latency_s == pytest.approx(1e-4) and several.inside == machine.inside
    assert said == ["nodes have 4 to 8 GPUs; 4 of each are counted"]
    host = cluster(num_devices=2, devices_per_node=2, shared_host=True)
    found = _with_nodes(host, "cpu", points, [2, 2], said.append)
    assert found.between.bytes_per_s == pytest.approx(1e9) and replace(found, between=host.between) == host


def test_one_node_has_no_link_between_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(between_nodes, "per_node", {"CPU": [4], "GPU": [0, 0]}.__getitem__)
    with pytest.raises(
        ResourceError, match="needs two nodes with a CPU, and the Ray cluster has 1; start Ray"
    ):
        between_nodes.measure("cpu")
    with pytest.raises(ResourceError, match="needs two nodes with a GPU, and the Ray cluster has 0"):
        between_nodes.measure("cuda")


def test_a_busy_machine_is_not_calibrated_unless_forced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about = {"date": "2026-12-01", "machine": "m", "disturbed": "other programs used 30% of the cores"}
    monkeypatch.setattr(
        "cluster.calibration.calibrate.calibrate", lambda *_, **__: Calibration(cluster(), {}, about)
    )
    monkeypatch.setattr(noise, "machine_noise", lambda: noise.Noise(0.3, 2.5))
    asked = ["calibrate", "--device", "cpu", "--out", str(tmp_path / "hardware.yaml")]
    assert main(asked) == 2 and not (tmp_path / "hardware.yaml").exists()
    said = capsys.readouterr().err
    assert (
        "other programs use 30% of the cores and the same computation takes up to 2.5 times as long" in said
    )
    assert "stop other programs (see `top`)" in said and "--force measures all the same" in said
    assert main([*asked, "--force"]) == 0
    assert "# other programs used 30% of the cores" in (tmp_path / "hardware.yaml").read_text()
    monkeypatch.setattr(noise, "machine_noise", lambda: noise.Noise(0.1, 1.5))
    assert main(asked) == 0


def test_noise_is_measured() -> None:
    found = noise.machine_noise(0.0)
    assert 0 <= found.share_of_others <= 1 and found.spread >= 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--ray-address", "127.0.0.1:1"), "no Ray cluster answers at 127.0.0.1:1"),
        (("--out", "/no/such/hardware.yaml"), "there is no directory /no/such"),
        (("--device", "tpu"), "invalid choice: 'tpu'"),
        pytest.param(
            ("--device", "cuda"),
            "torch sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_bad_input_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    sentence: str,
) -> None:
    monkeypatch.setattr(noise, "machine_noise", lambda: noise.Noise(0.0, 1.0))
    try:
        code: object = main(["calibrate", *arguments])
    except SystemExit as error:
        code = error.code
    shown = capsys.readouterr()
    assert (code, shown.out) == (2, "") and sentence in shown.err and len(shown.err.splitlines()) == 1
