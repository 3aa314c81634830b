"""The hardware of a cluster for the cost model: devices, links and per-step overheads.

Presets hold datasheet figures, and what kernels reach of them, fitted to other engines' points; `qwen3-dist calibrate`
measures both.
Sources of every figure: docs/cost-model.md.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from cluster.yaml_file import read_yaml
from qwen3_dist.errors import ConfigError


def _require_positive(part: Any, skip: tuple[str, ...]) -> None:
    """Raises ConfigError unless all fields of the dataclass `part` but those in `skip` are positive."""
    for field in fields(part):
        value = getattr(part, field.name)
        if field.name not in skip and not value > 0:
            raise ConfigError(f"{field.name} must be positive, not {value:g}")


@dataclass(frozen=True)
class WeightRates:
    """What products with quantised weights reach. `speed` is relative to products with plain weights, and
    `read_efficiency` a share of the device's `read_bytes_per_s`; those of experts are relative to these two."""

    speed: float = 1.0
    read_efficiency: float = 1.0
    expert_efficiency: float = 1.0
    expert_read_efficiency: float = 1.0
    idle_expert_reads: float = 0.0  # share of the experts without tokens whose weights are read all the same
    expert_layer_overhead_s: float = 0.0  # more per layer with experts

    def __post_init__(self) -> None:
        _require_positive(self, skip=("idle_expert_reads", "expert_layer_overhead_s"))
        if not 0 <= self.idle_expert_reads <= 1:
            raise ConfigError(f"idle_expert_reads must be from 0 to 1, not {self.idle_expert_reads:g}")
        if self.expert_layer_overhead_s < 0:
            raise ConfigError(
                f"expert_layer_overhead_s must not be negative, not {self.expert_layer_overhead_s:g}"
            )


MOST_DEVICES = 1_000_000  # of a cluster that is planned for
_WEIGHT_KINDS = ("fp8", "fp8_block", "int8", "int4", "fp4")


@dataclass(frozen=True)
class Device:
    """One accelerator; on CPU the whole host (see `Cluster.shared_host`).

    Each efficiency is the share of `read_bytes_per_s` or `flops_per_s` that one kind of operation reaches.
    """

    name: str
    memory_bytes: int
    read_bytes_per_s: float
    flops_per_s: float  # dense bf16 matrix products
    read_efficiency: float = 1.0  # reading weights
    kv_read_efficiency: float = 1.0  # reading keys and values while decoding
    flops_efficiency: float = 1.0  # matrix products with many rows
    attention_efficiency: float = 1.0  # attention in prefill
    expert_efficiency: float = 1.0  # grouped matrix products of experts, relative to plain ones
    memory_utilization: float = 0.9  # share of the memory that weights, activations and cache may fill
    row_rates: tuple[tuple[float, float], ...] = ()  # measured (rows, flops/s); replaces flops_efficiency
    power_w: float = 0.0  # most that the device may draw, in W; 0: unknown
    fp8: WeightRates | None = None  # a scale for each output
    fp8_block: WeightRates | None = None  # a scale for each block, as in Qwen's own checkpoints
    int8: WeightRates | None = None
    int4: WeightRates | None = None
    fp4: WeightRates | None = None

    def __post_init__(self) -> None:
        _require_positive(self, skip=("name", "row_rates", "power_w", *_WEIGHT_KINDS))
        if self.power_w < 0:
            raise ConfigError(f"power_w must not be negative, not {self.power_w:g}")
        for name in ("read_efficiency", "kv_read_efficiency", "flops_efficiency", "attention_efficiency"):
            if getattr(self, name) > 1:
                raise ConfigError(f"{name} must be at most 1, not {getattr(self, name):g}")
        if self.memory_utilization > 1:
            raise ConfigError(f"memory_utilization must be at most 1, not {self.memory_utilization:g}")
        rows = [row for row, _ in self.row_rates]
        if rows != sorted(set(rows)) or any(value <= 0 for pair in self.row_rates for value in pair):
            raise ConfigError(
                "row_rates must be pairs [rows, flops/s] of positive numbers in ascending order of rows"
            )


@dataclass(frozen=True)
class Link:
    """One direction of a device's link: a message takes `latency_s` plus its bytes at `efficiency` of `bytes_per_s`.

    The optional fields replace these figures for one kind of collective, where it was measured.
    """

    latency_s: float
    bytes_per_s: float
    efficiency: float = 1.0
    all_reduce: Link | None = None
    all_gather: Link | None = None
    reduce_scatter: Link | None = None
    all_to_all: Link | None = None
    send: Link | None = None  # point to point, between pipeline stages

    def __post_init__(self) -> None:
        if self.latency_s < 0:
            raise ConfigError(f"latency_s must not be negative, not {self.latency_s:g}")
        kinds = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
        _require_positive(self, skip=("latency_s", *kinds))
        if self.efficiency > 1:
            raise ConfigError(f"efficiency must be at most 1, not {self.efficiency:g}")

    def of(self, collective: str) -> Link:
        """The link to use for this kind of collective."""
        special: Link | None = getattr(self, collective, None)
        return special or self


@dataclass(frozen=True)
class Cluster:
    """`num_devices` equal devices on nodes of `devices_per_node`, and the overheads of a step.

    shared_host: ranks are CPU processes that share the cores and memory of one host. Then `device` is the whole host,
    and its one replica gets all of it, however many ranks it has.
    """

    device: Device
    num_devices: int
    devices_per_node: int
    inside: Link  # between the devices of a node
    between: Link  # between nodes
    step_overhead_s: float  # fixed cost of a step
    sequence_overhead_s: float = 0.0  # per sequence
    token_overhead_s: float = 0.0  # per token
    request_overhead_s: float = 0.0  # per request, before its first token: HTTP and text
    request_token_overhead_s: float = 0.0  # the same per token of its prompt
    layer_overhead_s: float = 0.0  # per layer of a rank: kernel launches, norms, small operations
    prompt_layer_overhead_s: float = 0.0  # more per layer in a step with prompts, which runs without a graph
    idle_step_overhead_s: float = 0.0  # more per step if one is in flight: the device waits for the host
    idle_sequence_overhead_s: float = 0.0  # the same per sequence
    ranks_overhead_s: float = 0.0  # extra cost of a step if ranks run outside the engine's process
    shared_host: bool = False

    def __post_init__(self) -> None:
        for name in ("num_devices", "devices_per_node"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.num_devices > MOST_DEVICES:
            raise ConfigError(f"num_devices must be at most {MOST_DEVICES:,}, not {self.num_devices:.4g}")
        for field in fields(self):
            if field.name.endswith("_overhead_s") and getattr(self, field.name) < 0:
                raise ConfigError(f"{field.name} must not be negative, not {getattr(self, field.name):g}")
        if self.num_devices > self.devices_per_node and self.num_devices % self.devices_per_node:
            near = self.num_devices // self.devices_per_node * self.devices_per_node
            raise ConfigError(
                f"num_devices={self.num_devices} does not fill nodes of {self.devices_per_node}; "
                f"{near} or {near + self.devices_per_node} do"
            )
        if self.shared_host and self.num_devices > self.devices_per_node:
            raise ConfigError("shared_host means one host; set devices_per_node to num_devices")

    @property
    def device_kind(self) -> str:
        """`cpu` for a shared host, else `cuda`."""
        return "cpu" if self.shared_host else "cuda"

    def outside_s(self, input_len: float) -> float:
        """Seconds of the TTFT of a prompt that pass outside the engine."""
        return self.request_overhead_s + self.request_token_overhead_s * input_len

    def replicas(self, world: int) -> int:
        """How many replicas of `world` ranks fit into the cluster."""
        return 1 if self.shared_host else self.num_devices // world

    def rank_device(self, world: int) -> Device:
        """The device of one rank: on a shared host, its 1 / `world` share of the host."""
        if not self.shared_host or world == 1:
            return self.device
        whole = self.device
        return replace(
            whole,
            memory_bytes=whole.memory_bytes // world,
            read_bytes_per_s=whole.read_bytes_per_s / world,
            flops_per_s=whole.flops_per_s / world,
            row_rates=tuple((rows, rate / world) for rows, rate in whole.row_rates),
        )


# Shares of the datasheets' figures and overheads that `python -m benchmarks.published --fit` found.
FITTED: dict[str, Any] = json.loads(Path(__file__).with_name("fitted.json").read_text())


def fitted_weights(constants: dict[str, Any], device: str) -> dict[str, Any]:
    """The `WeightRates` of `device` by kind: as fitted there, or else on another device.

    Of kinds that were fitted nowhere it is assumed that their bytes are read as fast as those of plain weights.
    """
    plain, experts = (constants["device"][name] for name in ("read_efficiency", "expert_efficiency"))
    rates = {}
    for kind in _WEIGHT_KINDS:
        values = {"read_efficiency": plain, "expert_efficiency": experts}
        for name in (*constants["weights"], device):
            values |= constants["weights"].get(name, {}).get(kind, {})
        rates[kind] = WeightRates(**values)
    return rates


def _nvidia(name: str, memory_gb: float, read: float, flops: float) -> Device:
    weights = fitted_weights(FITTED, name)
    power_w = {"A100": 400.0, "H100": 700.0, "H200": 700.0, "B200": 1000.0}[name]
    return Device(name, int(memory_gb * 1e9), read, flops, power_w=power_w, **FITTED["device"], **weights)


def _preset(device: Device, nvlink: float, network: float) -> Cluster:
    latency_s, efficiency = FITTED["link"]["latency_s"], FITTED["link"]["efficiency"]
    return Cluster(
        device,
        num_devices=8,
        devices_per_node=8,
        inside=Link(latency_s, nvlink, efficiency),
        between=Link(2.5 * latency_s, network, efficiency),
        **FITTED["step"],
    )


PRESETS: dict[str, Cluster] = {
    "A100": _preset(_nvidia("A100", 85.1, 2.039e12, 312e12), nvlink=300e9, network=25e9),
    "H100": _preset(_nvidia("H100", 85.0, 3.35e12, 989e12), nvlink=450e9, network=50e9),
    "H200": _preset(_nvidia("H200", 150.1, 4.8e12, 989e12), nvlink=450e9, network=50e9),
    "B200": _preset(_nvidia("B200", 191.5, 8.0e12, 2250e12), nvlink=900e9, network=50e9),
}


def parse_gpus(text: str) -> Cluster:
    """Parses `16xH100` (16 devices of a preset, on nodes of 8) or `4x4xH100` (4 nodes of 4). Raises ConfigError."""
    match = re.fullmatch(r"(?:0*([1-9]\d*)\s*[xX*]\s*)?0*([1-9]\d*)\s*[xX*]\s*([a-zA-Z]\w*)", text.strip())
    if not match:
        raise ConfigError(
            f"{text!r} is not a number of GPUs; write it as 16xH100, or as 2x8xH100 for 2 nodes of 8 GPUs"
        )
    preset = _find_preset(match[3])
    if match[1] is None:
        return replace(preset, num_devices=int(match[2]))
    nodes, per_node = int(match[1]), int(match[2])
    return replace(preset, num_devices=nodes * per_node, devices_per_node=per_node)


def read_cluster(path: str | Path) -> Cluster:
    """Reads a cluster file: YAML with the fields of `Cluster`. With `preset: H100` they override those of the preset.

    Raises ConfigError with file, line and reason.
    """
    file = read_yaml(path)
    if "preset" not in file.values:
        return file.settings(Cluster)
    try:
        base = _find_preset(str(file.values.pop("preset")))
    except ConfigError as error:
        raise file.refusal(("preset",), str(error)) from None
    return file.settings(Cluster, base)


def as_dict(part: Any) -> dict[str, Any]:
    """A Cluster, Device or Link as plain values for YAML or JSON, without fields at their defaults."""
    values: dict[str, Any] = {}
    for field in fields(part):
        value = getattr(part, field.name)
        if value == field.default:
            continue
        if isinstance(value, (Device, Link, WeightRates)):
            value = as_dict(value)
        elif isinstance(value, tuple):
            value = [list(pair) for pair in value]
        values[field.name] = value
    return values


def _find_preset(name: str) -> Cluster:
    if name.upper() not in PRESETS:
        raise ConfigError(
            f"there is no preset {name!r}; use one of {', '.join(PRESETS)}, or --cluster FILE.yaml"
        )
    return PRESETS[name.upper()]
