"""Prefill and decode on different replicas: planned only, since the service cannot run it yet.

Prefill replicas read prompts and make the first token. Each prompt's KV cache then moves over the link to a decode
replica, which makes the other tokens. docs/cost-model.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from cluster.hardware import Cluster, Link
from cluster.planning.cost_model import StepShape
from cluster.planning.layout_loads import LayoutLoads, largest_that_fits, last
from cluster.planning.planner import PlanRequest, cost_model
from qwen3_dist.config import ModelConfig
from qwen3_dist.errors import ConfigError
from qwen3_dist.layout import Layout, divisors, valid_layouts

# Larger batches of prompts wait longer for the last hundredth of a replica's rate.
_NEARLY = 0.99
_NODES = (1, 2, 4)  # of the largest replicas that are tried


@dataclass(frozen=True)
class Disaggregated:
    """Replicas of either kind on `num_devices`, and what they serve at most within the limits.

    itl_ms: the mean time between tokens, in which the `transfer_ms` of a prompt's KV cache counts once a request.
    """

    prefill: Layout
    prefill_replicas: int
    decode: Layout
    decode_replicas: int
    num_devices: int
    requests_per_s: float
    ttft_ms: float
    itl_ms: float
    transfer_ms: float

    def as_json(self) -> dict[str, object]:
        """The object that `qwen3-dist plan --disaggregated --json` prints. can_run: whether the service can do it."""
        return {
            "can_run": False,
            "prefill": {"layout": str(self.prefill), "replicas": self.prefill_replicas},
            "decode": {"layout": str(self.decode), "replicas": self.decode_replicas},
            "num_gpus": self.num_devices,
            "most_requests_per_s": round(self.requests_per_s, 3),
            "ttft_ms": round(self.ttft_ms, 3),
            "itl_ms": round(self.itl_ms, 3),
            "transfer_ms": round(self.transfer_ms, 3),
        }


class PrefillReplica:
    """One replica that reads prompts and makes one token of each, at the most that the TTFT limit allows."""

    def __init__(self, config: ModelConfig, layout: Layout, cluster: Cluster, request: PlanRequest) -> None:
        self.layout = layout
        prompts = replace(request, output_len=1, itl_ms=None)
        loads = LayoutLoads(config, layout, replace(cluster, num_devices=layout.world), prompts)
        within = loads.most_within_limits() if loads.fits else 0
        self.requests_per_s = self.ttft_ms = 0.0
        if within:
            nearly = _NEARLY * loads.requests_per_s(within)
            batch = min(within, 1 + last(within, lambda n: loads.requests_per_s(n) < nearly))
            self.requests_per_s, self.ttft_ms = loads.requests_per_s(batch), loads.at(batch).ttft_ms or 0.0


class DecodeReplica:
    """One replica that gets prompts' KV caches and makes all tokens but the first."""

    def __init__(self, config: ModelConfig, layout: Layout, cluster: Cluster, request: PlanRequest) -> None:
        self.layout, self._request = layout, request
        cluster = replace(cluster, num_devices=layout.world)
        self._model = cost_model(config, layout, cluster, request)
        tp_fits = layout.tp == 1 or cluster.devices_per_node % layout.tp == 0
        most = min(request.max_num_batched_tokens, self._held(1)) if tp_fits else 0
        self.largest = largest_that_fits(most, self._held)
        self._token_s: dict[int, float] = {}

    def itl_s(self, sequences: int, transfer_s: float) -> float:
        """Mean seconds between tokens with `sequences` in each dp group, with one transfer for each request."""
        if sequences not in self._token_s:
            load, later = self._request.workload, self._request.output_len - 1
            context = int(sequences * (load.input_len + load.output_len / 2))
            rows = (1 + load.drafted) * sequences
            shape = StepShape(rows, context, 0, 0, rows)
            self._token_s[sequences] = self._model.step_seconds(shape) * load.decode_steps / later
        return self._token_s[sequences] + transfer_s / (self._request.output_len - 1)

    def most(self, transfer_s: float) -> tuple[float, float]:
        """The most requests/s within the ITL limit and the cache, and the ITL in seconds then; zeros if there is no
        such load. A sequence's cache is taken from the beginning of its transfer."""
        limit_s = (self._request.itl_ms or float("inf")) / 1e3
        within = last(self.largest, lambda n: self.itl_s(n, transfer_s) <= limit_s)
        if not within:
            return 0.0, 0.0
        itl_s = self.itl_s(within, transfer_s)
        return within * self.layout.dp / ((self._request.output_len - 1) * itl_s), itl_s

    def _held(self, sequences: int) -> int:
        """Sequences that the cache of a dp group holds beside activations of `sequences`."""
        return self._model.kv_capacity_tokens(sequences, sequences) // self._request.length


def best_split(
    config: ModelConfig, cluster: Cluster, request: PlanRequest, rate: float | None = None
) -> Disaggregated | None:
    """The replicas of either kind that serve most on `cluster`; with a `rate`, the fewest devices like those of
    `cluster` that serve it. None if no such pair fits or keeps the limits.

    Raises ConfigError if nothing is left to decode, or if ranks share one host.
    """
    if request.output_len < 2:
        raise ConfigError("--disaggregated needs tokens to decode; raise --output-len to 2 or more")
    if cluster.shared_host:
        raise ConfigError(
            "--disaggregated needs a device for each replica, and here all ranks share one host"
        )
    across = rate is not None or cluster.num_devices > cluster.devices_per_node
    link = (cluster.between if across else cluster.inside).of("send")
    layouts = [layout for world in _worlds(cluster, rate) for layout in valid_layouts(config, world)]
    kv = {one: _prompt_bytes(config, one, cluster, request) for one in layouts}
    prefills = _best_of_each(PrefillReplica(config, one, cluster, request) for one in layouts)
    decoders = [DecodeReplica(config, one, cluster, request) for one in layouts]
    found: list[Disaggregated] = []
    for prefill in prefills:
        for decoder in decoders:
            worlds = (prefill.layout.world, decoder.layout.world)
            if not decoder.largest or max(worlds) % min(worlds):
                continue  # devices of a node would be left over
            seconds = transfer_s(max(kv[prefill.layout], kv[decoder.layout]), link)
            pair = _sized(prefill, decoder, cluster, rate, seconds)
            found += [pair] if pair is not None else []
    if rate is not None:
        return min(found, key=lambda one: (one.num_devices, -one.requests_per_s), default=None)
    return max(found, key=lambda one: one.requests_per_s, default=None)


def transfer_s(bytes_per_rank: float, link: Link) -> float:
    """Seconds to move a prompt's KV cache, of which the fullest rank of either side has `bytes_per_rank`. All ranks
    send at once."""
    return link.latency_s + bytes_per_rank / (link.bytes_per_s * link.efficiency)


def _prompt_bytes(config: ModelConfig, layout: Layout, cluster: Cluster, request: PlanRequest) -> float:
    """Bytes of a prompt's KV cache on the fullest rank."""
    return cost_model(config, layout, cluster, request).kv_bytes_per_token() * request.input_len


def _best_of_each(replicas: Iterator[PrefillReplica]) -> list[PrefillReplica]:
    """Of each number of ranks the replica that reads most prompts."""
    best: dict[int, PrefillReplica] = {}
    for one in replicas:
        world = one.layout.world
        if one.requests_per_s and (world not in best or one.requests_per_s > best[world].requests_per_s):
            best[world] = one
    return list(best.values())


def _sized(
    prefill: PrefillReplica, decoder: DecodeReplica, cluster: Cluster, rate: float | None, seconds: float
) -> Disaggregated | None:
    """The best numbers of replicas of a pair; None if the limits or the cluster allow none.

    A dp group moves one cache at a time, which bounds what either side serves.
    """
    decoded, itl_s = decoder.most(seconds)
    reads = min(prefill.requests_per_s, prefill.layout.dp / seconds)
    makes = min(decoded, decoder.layout.dp / seconds)
    if not reads or not makes:
        return None
    here, there = prefill.layout.world, decoder.layout.world
    if rate is not None:
        counts = [(ceil(rate / reads), ceil(rate / makes))]
    else:
        most = cluster.num_devices
        counts = [
            (x, (most - x * here) // there) for x in range(1, most // here + 1) if most - x * here >= there
        ]
    if not counts:
        return None
    x, y = max(counts, key=lambda pair: min(pair[0] * reads, pair[1] * makes))
    devices, node = x * here + y * there, cluster.devices_per_node
    devices = (
        cluster.num_devices if rate is None else devices if devices <= node else ceil(devices / node) * node
    )
    served = min(x * reads, y * makes)
    return Disaggregated(
        prefill.layout, x, decoder.layout, y, devices, served, prefill.ttft_ms, 1e3 * itl_s, 1e3 * seconds
    )


def _worlds(cluster: Cluster, rate: float | None) -> Iterator[int]:
    """Numbers of ranks of a replica: those that divide a node, and whole nodes; on a cluster of this size, less than
    all of it."""
    node = cluster.devices_per_node
    for world in (*divisors(node)[:-1], *(node * count for count in _NODES)):
        if rate is not None or world < cluster.num_devices:
            yield world
