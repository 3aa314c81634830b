"""A service on this machine whose steps take as long as those of a GPU that it has not, and use no CPU time.

Scheduler, ranks' processes, Serve, HTTP and text are real. `modelled` is the cost of its steps, and `settings` the
service; the simulator gets the same of both.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from typing import Any

from benchmarks.paced import pace, run_rank
from cluster.hardware import Cluster, parse_gpus
from cluster.planning.cost_model import CostModel
from cluster.planning.official import find_config
from cluster.simulation.replica import ReplicaConfig
from cluster.simulation.step_times import shape_of
from qwen3_dist.layout import Layout
from qwen3_dist.protocol.messages import RankSpec
from qwen3_dist.protocol.step_limits import SchedulerLimits
from serve_app.replica.deployment import EngineReplica
from serve_app.settings import ReplicaSettings

MODEL, GPUS = "Qwen3-8B", "1xH100"
SLOWER = (
    "QWEN3_DIST_BENCHMARK_SLOWER"  # how many times as long as on the GPU each step takes; ranks inherit it
)
SLOWER_TIMES = 8.0  # so that HTTP's share of this machine's cores is small beside the steps
LIMITS = SchedulerLimits(max_num_seqs=64, max_num_batched_tokens=2048)
NUM_BLOCKS, BLOCK_SIZE = 4096, 16
PORT = 8795


class ModelledReplica(EngineReplica):
    """An EngineReplica whose steps take as long as the model says."""

    def __init__(self, settings: ReplicaSettings) -> None:
        pace(modelled_rank)
        super().__init__(settings)


def modelled_rank(spec: RankSpec) -> None:
    """Runs a rank of `modelled`."""
    cost = modelled(float(os.environ[SLOWER]))
    run_rank(spec, lambda plan: cost.step_seconds(shape_of(plan)))


@cache
def modelled(slower: float) -> CostModel:
    """The cost of steps that take `slower` times as long as on the GPU."""
    _, config = find_config(MODEL)
    return CostModel(config, Layout(), slowed(parse_gpus(GPUS), slower))


def slowed(cluster: Cluster, times: float) -> Cluster:
    """One device of `cluster`, on which every step takes `times` times as long."""
    device = cluster.device
    rows = tuple((number, rate / times) for number, rate in device.row_rates)
    device = replace(
        device,
        read_bytes_per_s=device.read_bytes_per_s / times,
        flops_per_s=device.flops_per_s / times,
        row_rates=rows,
    )
    names = ("step", "sequence", "token", "layer", "prompt_layer", "ranks")
    overheads = {f"{name}_overhead_s": getattr(cluster, f"{name}_overhead_s") * times for name in names}
    return replace(cluster, device=device, **overheads)


def settings(**scaling: Any) -> dict[str, Any]:
    """Flat settings of the service."""
    return {
        "device": "cpu",
        "num_blocks": NUM_BLOCKS,
        "block_size": BLOCK_SIZE,
        "max_num_seqs": LIMITS.max_num_seqs,
        "max_num_batched_tokens": LIMITS.max_num_batched_tokens,
        "prefix_caching": False,
        "threads_per_rank": 1,
        "stream_parts_per_s": 0,
        "model_name": "m",
        "port": PORT,
        **scaling,
    }


def simulated_replica() -> ReplicaConfig:
    """The replica of `settings` in a simulation."""
    return ReplicaConfig(NUM_BLOCKS, LIMITS, BLOCK_SIZE, prefix_caching=False, max_model_len=4096)
