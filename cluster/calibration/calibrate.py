"""Measures the constants of the cost model on this machine."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from cluster.calibration import collective_probe, probes, step_probe
from cluster.calibration.noise import BUSY, CpuUsage
from cluster.hardware import PRESETS, Cluster, Device, Link, as_dict
from cluster.planning.products import MatmulTime
from qwen3_dist.errors import ResourceError
from qwen3_dist.layout import Layout
from qwen3_dist.machine import hardware, versions

Report = Callable[[str], None]
Points = dict[str, list[tuple[int, float]]]
_EXPERT_TOKENS = (32, 128, 512)
_CPU_UTILIZATION = 0.8  # of the host's memory, of which the engine takes a share of the free part
_PLACEHOLDER_LINK = Link(1e-5, 25e9)  # for a single device, which has no links to measure


@dataclass(frozen=True)
class Calibration:
    """A measured cluster. `measured` has the raw measurements, `about` the date and the machine."""

    cluster: Cluster
    measured: dict[str, Any]
    about: dict[str, Any]

    def write(self, file: Path) -> None:
        """Writes the cluster file that `read_cluster` reads, headed by date and machine. Raises ResourceError."""
        lines = [f"# Measured by qwen3-dist calibrate on {self.about['date']}: {self.about['machine']}"]
        if self.about["disturbed"]:
            lines.append(f"# {self.about['disturbed']}")
        lines.append(yaml.safe_dump(as_dict(self.cluster), sort_keys=False, default_flow_style=None))
        try:
            file.write_text("\n".join(lines))
        except OSError as error:
            raise ResourceError(
                f"{file} cannot be written ({error.strerror}); choose another --out"
            ) from None


def calibrate(
    device: str,
    report: Report,
    sizes: probes.Sizes | None = None,
    rows: tuple[int, ...] = probes.ROWS,
    ray_address: str | None = None,
) -> Calibration:
    """Measures `device` ("cpu" or "cuda") in a minute or two, on an otherwise idle machine. With `ray_address`, also
    the link between two nodes of that Ray cluster, which have such devices too. Raises ResourceError.

    On CPU, `about` has the share of the cores that other programs took, and `report` gets a warning if it is too
    large.
    """
    where = torch.device(device)
    ranks = torch.cuda.device_count() if device == "cuda" else len(os.sched_getaffinity(0))
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    sizes = sizes or probes.Sizes.for_device(where)
    measured: dict[str, Any] = {}
    between = _measure_between(device, ray_address, report) if ray_address is not None else None
    usage = CpuUsage()
    profile = _measure_device(where, sizes, rows, measured, report)
    inside = _measure_links(device, ranks, measured, report, profile.name)
    cluster = Cluster(
        profile,
        num_devices=ranks,
        devices_per_node=ranks,
        inside=inside,
        between=inside,
        step_overhead_s=0.0,
        shared_host=device == "cpu",
    )
    cluster = _measure_overheads(cluster, device, measured, report)
    if between is not None:
        measured["collective_seconds_between_nodes"] = between[0]
        cluster = _with_nodes(cluster, device, *between, report)
    machine = f"{profile.name}, torch {versions()['torch']}, commit {versions()['commit']}"
    others = usage.share_of_others()
    disturbed = ""
    if device == "cpu" and others > BUSY:
        disturbed = (
            f"other programs used {others:.0%} of the cores, so rates are too low and overheads too high; calibrate "
            "again on an idle machine"
        )
        report(disturbed)
    about: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "hardware": hardware()}
    about |= {"cpu_share_of_others": round(others, 3), "disturbed": disturbed}
    return Calibration(_rounded(cluster), measured, about)


def _measure_device(
    where: torch.device, sizes: probes.Sizes, rows: tuple[int, ...], measured: dict[str, Any], report: Report
) -> Device:
    report("memory bandwidth")
    read = probes.read_rate(where, sizes)
    if where.type == "cpu":
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        measured["read_bytes_per_s_one_core"] = probes.read_rate(where, sizes)
        torch.set_num_threads(threads)
    measured["read_bytes_per_s"] = read
    report(f"matrix products of {rows[0]} to {rows[-1]} rows")
    by_rows = probes.row_seconds(where, sizes, rows)
    rates = {count: 2 * count / seconds for count, seconds in by_rows.items()}
    measured["flops_per_s_by_rows"] = rates
    report("attention")
    decode_s = probes.attention_seconds(where, 8, 1024, 1, sizes.repeats)
    prompt_s = probes.attention_seconds(where, 1, 512, 512, sizes.repeats)
    kv_rate = 8 * probes.attention_costs(1024, 1)[0] / decode_s
    attention_rate = probes.attention_costs(512, 512)[1] / prompt_s
    measured |= {"kv_read_bytes_per_s": kv_rate, "attention_flops_per_s": attention_rate}
    flops = max(rates.values())
    device = Device(
        _name(where),
        _memory(where),
        read,
        flops,
        read_efficiency=min(1.0, 2 / by_rows[rows[0]] / read),
        kv_read_efficiency=min(1.0, kv_rate / read),
        attention_efficiency=min(1.0, attention_rate / flops),
        memory_utilization=0.9 if where.type == "cuda" else _CPU_UTILIZATION,
        row_rates=tuple(rates.items()),
    )
    report("experts")
    efficiency = _expert_efficiency(device, where, sizes, measured)
    return replace(device, expert_efficiency=efficiency)


def _expert_efficiency(
    device: Device, where: torch.device, sizes: probes.Sizes, measured: dict[str, Any]
) -> float:
    """Median of predicted over measured time of a layer of experts."""
    experts, chosen, weights = probes.expert_shape(sizes)
    matmul = MatmulTime(device, weight_bytes=2.0)
    shares = {}
    for tokens in _EXPERT_TOKENS:
        touched = experts * (1 - (1 - chosen / experts) ** tokens)
        predicted = matmul.seconds(tokens * chosen / touched, touched * weights)
        shares[tokens] = predicted / probes.expert_seconds(where, sizes, tokens)
    measured["expert_efficiency_by_tokens"] = shares
    return statistics.median(shares.values())


def _measure_links(device: str, ranks: int, measured: dict[str, Any], report: Report, name: str) -> Link:
    if ranks < 2:
        return next((preset.inside for key, preset in PRESETS.items() if key in name), _PLACEHOLDER_LINK)
    report("collectives of 2 ranks")
    points = collective_probe.measure(2, device)
    measured["collective_seconds"] = points
    return collective_probe.link(points)


def _measure_between(device: str, address: str, report: Report) -> tuple[Points, list[int]]:
    from cluster.calibration.between_nodes import cluster_links

    return cluster_links(device, address, report)


def _with_nodes(cluster: Cluster, device: str, points: Points, counts: list[int], report: Report) -> Cluster:
    """`cluster` with the link between nodes that `points` were measured on and, on GPUs, with all nodes, which have so
    many each. A cluster of CPUs stays one host, as its ranks' devices are."""
    cluster = replace(cluster, between=collective_probe.link(points))
    if device == "cpu":
        return cluster
    if len(set(counts)) > 1:
        report(f"nodes have {min(counts)} to {max(counts)} GPUs; {min(counts)} of each are counted")
    return replace(cluster, num_devices=len(counts) * min(counts), devices_per_node=min(counts))


def _measure_overheads(cluster: Cluster, device: str, measured: dict[str, Any], report: Report) -> Cluster:
    report("steps of a small model on one rank")
    steps = step_probe.decode_steps(Layout(), device)
    prompt_s = step_probe.prompt_step(device)
    measured |= {"decode_steps": steps, "prompt_step": prompt_s}
    cluster = step_probe.with_overheads(cluster, steps, prompt_s)
    if cluster.num_devices < 2:
        return cluster
    report("steps of a small model on two ranks")
    layout = Layout(tp=2)
    steps = step_probe.decode_steps(layout, device)
    measured["decode_steps_two_ranks"] = steps
    ranks_s, collective_s = step_probe.fit_ranks(cluster, layout, steps)
    inside = cluster.inside
    slower = {
        kind: replace(inside.of(kind), latency_s=inside.of(kind).latency_s + collective_s)
        for kind in collective_probe.COLLECTIVES
        if kind != "send"
    }
    inside = replace(inside, **slower)  # type: ignore[arg-type]
    return replace(cluster, ranks_overhead_s=ranks_s, inside=inside, between=inside)


def _name(where: torch.device) -> str:
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    return f"{len(os.sched_getaffinity(0))} cores of {hardware()['cpu']}"


def _memory(where: torch.device) -> int:
    if where.type == "cuda":
        return int(torch.cuda.get_device_properties(where).total_memory)
    return int(hardware()["memory_gib"] * 2**30)


def _rounded(part: Any) -> Any:
    """`part` with every float rounded to four significant digits, recursively."""
    if isinstance(part, float):
        return float(f"{part:.4g}")
    if isinstance(part, tuple):
        return tuple(_rounded(each) for each in part)
    if isinstance(part, (Cluster, Device, Link)):
        return replace(part, **{name: _rounded(value) for name, value in vars(part).items()})
    return part
