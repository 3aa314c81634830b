"""Calibration: fits find what made the numbers, and a real run gives a file that the cost model reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.calibration import collective_probe, probes, step_probe
from cluster.calibration.calibrate import calibrate
from cluster.calibration.step_probe import LAYERS, fit_ranks, with_overheads
from cluster.hardware import Cluster, Link, read_cluster
from cluster.planning.cost_model import CostModel, StepShape
from qwen3_dist.layout import Layout
from serve_app.cli import main
from tests.cluster.machines import DENSE, cluster

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


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
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
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], sentence: str
) -> None:
    try:
        code: object = main(["calibrate", *arguments])
    except SystemExit as error:
        code = error.code
    shown = capsys.readouterr()
    assert (code, shown.out) == (2, "") and sentence in shown.err and len(shown.err.splitlines()) == 1
