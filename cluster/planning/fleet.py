"""The fewest GPUs that serve a rate of requests within limits, and why no number of them does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from cluster.hardware import MOST_DEVICES, Cluster
from cluster.planning.layout_loads import LayoutLoads, RatedLayout
from cluster.planning.limits import impossible, limits_of
from cluster.planning.planner import PlannedLayout, PlanRequest, candidates
from cluster.planning.ranking import ranked
from qwen3_dist.config import ModelConfig
from qwen3_dist.errors import ConfigError
from qwen3_dist.layout import Layout, valid_layouts

# Nodes of the largest replicas that are tried. Larger ones pay only where a model's memory or a limit asks for them.
_NODES = (2, 3, 4, 6, 8)


@dataclass(frozen=True)
class Fleet:
    """A cluster and the layout on it that serve a rate. `found` is all that the layout does there."""

    cluster: Cluster
    found: RatedLayout


def fewest(config: ModelConfig, kind: Cluster, request: PlanRequest, rate: float) -> Fleet:
    """The fewest devices like those of `kind` that serve `rate` requests/s within the limits of `request`.

    Up to one node any number is taken, and whole nodes beyond. Replicas serve alike, so each layout is asked once for
    the most that one replica serves, and its number of replicas follows. Raises ConfigError if a single request
    exceeds a limit or the memory with every layout, which no number of devices changes.
    """
    best: list[tuple[int, float, Layout]] = []  # of the fewest devices, what all serve, and the layout
    alone: list[PlannedLayout] = []
    for world in _worlds(kind):
        if best and world > best[0][0]:
            break
        for layout in valid_layouts(config, world):
            if request.layout not in (None, layout):
                continue
            loads = LayoutLoads(config, layout, replace(kind, num_devices=world), request)
            alone.append(loads.at(1))
            within = loads.most_within_limits()
            if not within:
                continue
            each = loads.requests_per_s(within)
            devices = _devices(kind, world, ceil(rate / each))
            if devices is None:
                continue
            if best and devices < best[0][0]:
                best.clear()
            if not best or devices == best[0][0]:
                best.append((devices, devices // world * each, layout))
    if not best:
        raise ConfigError(impossible(alone, request, f"no number of {kind.device.name}", "even idle"))
    devices, _, layout = ranked(best, lambda one: one[2], lambda one: one[1])[0]
    if devices > MOST_DEVICES:
        raise ConfigError(
            f"--rate {rate:g} needs {devices:.4g} x {kind.device.name}, and at most {MOST_DEVICES:,} are planned for; "
            "lower it"
        )
    cluster = replace(kind, num_devices=devices)
    return Fleet(cluster, LayoutLoads(config, layout, cluster, request).under(rate))


def all_under(config: ModelConfig, cluster: Cluster, request: PlanRequest, rate: float) -> list[RatedLayout]:
    """All layouts of all worlds that divide the cluster under `rate`: those that hold it first, then those that keep
    the limits, then those that fit; each by the most that it serves, as `ranked` has it."""
    layouts = candidates(config, cluster, request.layout)
    found = [LayoutLoads(config, layout, cluster, request).under(rate) for layout in layouts]
    return ranked(
        found,
        lambda one: one.planned.layout,
        lambda one: one.most_per_s or one.capacity_per_s,
        lambda one: (not one.planned.fits, not one.most_per_s, not one.holds),
    )


def check_rate(
    config: ModelConfig, cluster: Cluster, request: PlanRequest, rate: float, found: list[RatedLayout]
) -> None:
    """Raises ConfigError if layouts fit but none holds the rate. The message has the most that the cluster serves and
    the size that serves the rate; or, if no load keeps the limits, which limit and the nearest that can be met."""
    if not found[0].planned.fits or found[0].holds:
        return
    best = max(found, key=lambda one: one.most_per_s)
    where = f"{cluster.num_devices} x {cluster.device.name}"
    if not best.most_per_s:
        alone = [LayoutLoads(config, one.planned.layout, cluster, request).at(1) for one in found]
        raise ConfigError(impossible(alone, request, f"no layout on {where}", "even idle"))
    limits = limits_of(request)
    within = f" within {limits}" if limits else ""
    sentence = (
        f"{where} serve at most {best.most_per_s:.4g} requests/s of this load{within}, with "
        f"{best.planned.layout}: {1 - best.most_per_s / rate:.0%} less than --rate {rate:g}"
    )
    if cluster.shared_host:
        raise ConfigError(f"{sentence}; lower --rate")
    enough = fewest(config, cluster, request, rate)
    raise ConfigError(
        f"{sentence}; {enough.cluster.num_devices} x {cluster.device.name} serve it, with "
        f"{enough.found.planned.layout} in {counted(enough.found.planned.replicas, 'replica')}"
    )


def counted(number: int, noun: str) -> str:
    """`1 replica`, `2 replicas`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _worlds(kind: Cluster) -> Iterator[int]:
    """Numbers of ranks of a replica: up to one node, and a few whole nodes."""
    yield from range(1, kind.devices_per_node + 1)
    yield from (kind.devices_per_node * nodes for nodes in _NODES)


def _devices(kind: Cluster, world: int, replicas: int) -> int | None:
    """Devices that hold `replicas` of `world` ranks, whole nodes if more than one; None if nodes would be left with
    devices that no replica uses."""
    node = kind.devices_per_node
    if world * replicas <= node:
        return world * replicas
    if world < node and node % world:
        return None
    return ceil(world * replicas / node) * node if world <= node else world * replicas
