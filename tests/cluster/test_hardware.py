"""Cluster files and presets: what is read, and how what is wrong is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cluster.hardware import PRESETS, Cluster, Link, as_dict, parse_gpus, read_cluster
from qwen3_dist.errors import ConfigError
from tests.cluster.machines import PLAIN, cluster

PLAIN_FILE = """\
device:
  name: plain
  memory_bytes: 1_000_000_000
  read_bytes_per_s: 1e9
  flops_per_s: 1e12
  memory_utilization: 1
num_devices: 8
devices_per_node: 4
inside: {latency_s: 1e-6, bytes_per_s: 1e9}
between: {latency_s: 10e-6, bytes_per_s: 1e8}
step_overhead_s: 0
"""


def written(path: Path, text: str) -> Path:
    (path / "cluster.yaml").write_text(text)
    return path / "cluster.yaml"


def test_a_cluster_file_gives_every_field(tmp_path: Path) -> None:
    assert read_cluster(written(tmp_path, PLAIN_FILE)) == PLAIN


def test_a_preset_in_the_file_is_changed_by_what_stands_beside_it(tmp_path: Path) -> None:
    text = "preset: h100\nnum_devices: 32\nbetween:\n  bytes_per_s: 12.5e9\n"
    found = read_cluster(written(tmp_path, text))
    assert found.device == PRESETS["H100"].device and found.num_devices == 32
    assert found.between == replace(PRESETS["H100"].between, bytes_per_s=12.5e9)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    measured = cluster(inside=Link(1e-6, 1e9, all_to_all=Link(2e-6, 5e8)), layer_overhead_s=1e-5)
    for each in (*PRESETS.values(), measured):
        assert read_cluster(written(tmp_path, yaml.safe_dump(as_dict(each)))) == each


def test_gpus_are_a_number_and_a_preset() -> None:
    found = parse_gpus("16xH200")
    assert (found.num_devices, found.devices_per_node, found.device.name) == (16, 8, "H200")
    assert parse_gpus("1xb200").device.memory_bytes == 191_500_000_000


def test_gpus_may_be_given_by_nodes() -> None:
    assert parse_gpus("2x8xH200") == parse_gpus("16xH200")
    small = parse_gpus("3x4xA100")
    assert (small.num_devices, small.devices_per_node) == (12, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("H100", "'H100' is not a number of GPUs; write it as 16xH100, or as 2x8xH100 for 2 nodes of 8 GPUs"),
        ("8xT4", "there is no preset 'T4'; use one of A100, H100, H200, B200, or --cluster FILE.yaml"),
        (
            "0xH100",
            "'0xH100' is not a number of GPUs; write it as 16xH100, or as 2x8xH100 for 2 nodes of 8 GPUs",
        ),
        ("12xH100", "num_devices=12 does not fill nodes of 8; 8 or 16 do"),
    ],
)
def test_a_wrong_number_of_gpus_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_gpus(text)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("old", "new", "line", "reason"),
    [
        (
            "num_devices: 8",
            "num_devices: eight",
            7,
            "num_devices must be a whole number, not 'eight'",
        ),
        ("num_devices: 8", "num_devices: 7", 7, "num_devices=7 does not fill nodes of 4; 4 or 8 do"),
        (
            "num_devices: 8",
            "devices: 8",
            7,
            "unknown setting 'devices'; did you mean device?",
        ),
        ("num_devices: 8\n", "", 1, "setting 'num_devices' is required"),
        ("num_devices: 8", "num_devices: [8]", 7, "num_devices must be a whole number, not ['8']"),
        (
            "  flops_per_s: 1e12",
            "  flops_per_s: -1",
            5,
            "device: flops_per_s must be positive, not -1",
        ),
        ("utilization: 1", "utilization: 90", 6, "memory_utilization must be at most 1, not 90"),
        ("inside: {latency_s: 1e-6, ", "inside: {", 9, "setting 'inside.latency_s' is required"),
        (
            "inside: {latency_s: 1e-6,",
            "inside: {latency_s: fast,",
            9,
            "inside.latency_s must be a number, not 'fast'",
        ),
        (
            "between: {latency_s: 10e-6, bytes_per_s: 1e8}",
            "between: 5",
            10,
            "between must be a mapping, not '5'",
        ),
        ("step_overhead_s: 0", "step_overhead_s: -1", 11, "step_overhead_s must not be negative, not -1"),
        ("step_overhead_s: 0", "step_overhead_s: 0\nstep_overhead_s: 1", 12, "given twice; keep one"),
        ("step_overhead_s: 0", "preset: V100", 11, "there is no preset 'V100'"),
        ("step_overhead_s: 0", "shared_host: maybe", 11, "shared_host must be true or false, not 'maybe'"),
        ("memory_utilization: 1", "row_rates: [[4, 1e9], [1, 1e9]]", 6, "row_rates must be pairs"),
        ("inside: {", "inside: {{", 9, "9: this is not valid YAML; close the { that begins here"),
    ],
)
def test_a_wrong_file_is_refused_with_line_and_reason(
    tmp_path: Path, old: str, new: str, line: int, reason: str
) -> None:
    assert old in PLAIN_FILE
    file = written(tmp_path, PLAIN_FILE.replace(old, new))
    with pytest.raises(ConfigError) as refused:
        read_cluster(file)
    assert str(refused.value).startswith(f"{file}:{line}:")
    assert reason in str(refused.value)


def test_files_that_hold_no_mapping_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster.yaml:1: a mapping `key: value` is expected"):
        read_cluster(written(tmp_path, "- 1\n"))
    with pytest.raises(ConfigError, match="none.yaml cannot be read"):
        read_cluster(tmp_path / "none.yaml")


def test_ranks_of_a_shared_host_are_one_replica() -> None:
    shared: Cluster = cluster(shared_host=True, num_devices=4, devices_per_node=4)
    assert (shared.replicas(2), PLAIN.replicas(2)) == (1, 4)
    with pytest.raises(ConfigError, match="set devices_per_node to num_devices"):
        cluster(shared_host=True)
