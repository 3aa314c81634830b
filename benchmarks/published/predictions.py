"""What the cost model predicts for measured points, and how far off it is."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from benchmarks.published.points import Point
from cluster.hardware import PRESETS, Cluster
from cluster.planning.clients import Latencies, closed_loop
from cluster.planning.cost_model import CostModel
from cluster.planning.experts import EXPERT_EVENNESS, EXPERT_IMBALANCE
from cluster.planning.official import find_config
from cluster.planning.walk import StepRules, Workload, prompts_at_once
from qwen3_dist.config import ModelConfig
from qwen3_dist.layout import Layout

_TOKENS = 8192  # of a step
_SEQUENCES = 1024
_TIE = 1.05  # layouts nearer than this in TPOT are not put in order


@dataclass(frozen=True)
class Engine:
    """What an engine does by its documentation; nothing here is fitted. memory: share that weights, cache and
    activations fill. fp8_cache: checkpoints with quantised weights come with an fp8 cache. depth: steps in flight."""

    memory: float = 0.9
    fp8_cache: bool = False
    prompts_first: bool = False
    reserves: bool = False
    depth: int = 2

    def rules(self, point: Point, dp: int, capacity: int) -> StepRules:
        """How the engine forms the steps of a point with `dp` groups, each with a cache of `capacity` tokens."""
        most = None if self.prompts_first else prompts_at_once(point.batch * dp, point.output_len)
        return StepRules(_TOKENS, _SEQUENCES * dp, capacity * dp, most, dp, self.prompts_first, self.reserves)


ENGINES = {
    "sglang": Engine(memory=0.87, prompts_first=True),
    "trtllm": Engine(fp8_cache=True, reserves=True),
    "vllm": Engine(depth=1),  # --async-scheduling is off by default in 0.12
}


def layout_of(config: ModelConfig, point: Point) -> Layout:
    """The layout that a point names. Where experts are spread over more ranks than tp, attention runs in dp groups."""
    tp, dp, etp, ep = point.layout
    if not config.num_experts:
        return Layout(tp=tp, dp=max(1, dp))
    world = max(tp * max(1, dp), max(1, etp) * max(1, ep))
    return Layout(tp=tp, dp=world // tp, ep=max(1, ep))


def predicted(
    point: Point,
    cluster: Cluster | None = None,
    expert_imbalance: float = EXPERT_IMBALANCE,
    expert_evenness: float = EXPERT_EVENNESS,
) -> Latencies:
    """What the clients of a point see by the cost model, on `cluster` or the preset of the point's device."""
    config = _config(point.model)
    layout = layout_of(config, point)
    engine = ENGINES.get(point.engine, Engine())
    cluster = cluster or PRESETS[point.device]
    device = replace(cluster.device, memory_utilization=engine.memory)
    cluster = replace(cluster, num_devices=layout.world, devices_per_node=max(8, layout.world), device=device)
    kv_bytes = 1.0 if engine.fp8_cache and config.quantization is not None else None
    model = CostModel(
        config, layout, cluster, expert_imbalance, expert_evenness=expert_evenness, kv_bytes=kv_bytes
    )
    longest = point.input_len + point.output_len
    capacity = max(longest + 1, model.kv_capacity_tokens(_TOKENS, 256))
    load = Workload(point.input_len, point.output_len)
    rules = engine.rules(point, layout.dp, capacity)
    return closed_loop(model, rules, load, point.batch * layout.dp, depth=engine.depth)


def errors(points: Sequence[Point], found: Sequence[Latencies]) -> dict[str, float | int]:
    """Mean absolute relative errors and biases of TTFT and TPOT, and pairs of layouts in the right order."""
    ttft = [1e3 * each.ttft_s / point.ttft_ms - 1 for point, each in zip(points, found, strict=True)]
    tpot = [1e3 * each.itl_s / point.tpot_ms - 1 for point, each in zip(points, found, strict=True)]
    right, pairs = ordered_pairs(points, [each.itl_s for each in found])
    return {
        "points": len(points),
        "ttft_mape": statistics.fmean(map(abs, ttft)),
        "tpot_mape": statistics.fmean(map(abs, tpot)),
        "ttft_bias": statistics.fmean(ttft),
        "tpot_bias": statistics.fmean(tpot),
        "pairs_right": right,
        "pairs": pairs,
    }


def ordered_pairs(points: Sequence[Point], found: Sequence[float]) -> tuple[int, int]:
    """Of the pairs of layouts of one workload whose measured TPOT differs by more than 5%, those that `found` has in
    the measured order, and all."""
    workloads = defaultdict(list)
    for point, value in zip(points, found, strict=True):
        workloads[point.workload].append((point.tpot_ms, value, point.layout))
    right = pairs = 0
    for layouts in workloads.values():
        for one, other in itertools.combinations(sorted(layouts), 2):
            if one[2] != other[2] and other[0] > _TIE * one[0]:
                pairs += 1
                right += other[1] > one[1]
    return right, pairs


@cache
def _config(model: str) -> ModelConfig:
    return find_config(model)[1]
